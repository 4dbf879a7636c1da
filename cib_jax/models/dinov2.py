"""DINOv2's vision transformers, with and without registers (arXiv 2304.07193, 2309.16588)."""

from collections.abc import Mapping

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.models import vit
from cib_jax.models.state_dict import Tree
from cib_jax.models.vit import Block, Design, LayerNorm, Layout, Part, Stem, gelu, in_chunks


def _design(width: int, heads: int, registers: int) -> Design:
    # Trained at 518 pixels. Position embeddings go to other grids as in Hugging Face's `transformers`: with registers
    # filtered, without them not.
    return Design(
        patch=14,
        grid=37,
        width=width,
        heads=heads,
        epsilon=1e-6,
        activation=gelu,
        layer_scale=True,
        registers=registers,
        antialias=registers > 0,
    )


SMALL = _design(384, 6, 0)
BASE = _design(768, 12, 0)
SMALL_REGISTERS = _design(384, 6, 4)
BASE_REGISTERS = _design(768, 12, 4)


class DINOv2(nnx.Module):
    """The network up to the class token after the last layer norm; it takes any multiples of 14 pixels."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.stem = Stem(rngs, design)
        self.blocks = nnx.List([Block(rngs, design) for _ in range(design.depth)])
        self.norm = LayerNorm(design.width, design.epsilon)
        self.design = design

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch width"]:
        """Returns the features of normalized images, in their dtype if the parameters have it too.

        Raises:
            ValueError: if the images are not multiples of 14 pixels high and wide.
        """
        return in_chunks(self._features, images, self.design)

    def _features(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch width"]:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


def convert(tensors: Mapping[str, np.ndarray], design: Design) -> Tree:
    """Returns the state of `DINOv2` from tensors in the names of `transformers`, as published on the Hugging Face hub.

    Raises:
        MismatchError: if tensors are missing, unknown or of another shape.
    """
    # What stands for hidden patches in training.
    return vit.fill(published(design), tensors, {"embeddings.mask_token"})


def published(design: Design) -> Layout:
    """Returns where each parameter lies in the published file."""
    width = design.width

    def rows(count: int) -> tuple[int, int, int]:
        return (1, count, width)

    stem: Layout = {
        "patches": vit.patches("embeddings.patch_embeddings.projection", design),
        "class_token": Part("embeddings.cls_token", rows(1), np.ravel),
        "positions": Part("embeddings.position_embeddings", rows(design.positions), np.squeeze),
    }
    if design.registers:
        stem["registers"] = Part("embeddings.register_tokens", rows(design.registers), np.squeeze)
    return {
        "stem": stem,
        "blocks": {i: _block(f"encoder.layer.{i}", design) for i in range(design.depth)},
        "norm": vit.norm("layernorm", width),
    }


def _block(name: str, design: Design) -> Layout:
    width = design.width
    attention = {
        ours: vit.linear(f"{name}.attention.{theirs}", width, width)
        for ours, theirs in (
            ("query", "attention.query"),
            ("key", "attention.key"),
            ("value", "attention.value"),
            ("out", "output.dense"),
        )
    }
    return {
        "norm1": vit.norm(f"{name}.norm1", width),
        "attention": attention,
        "scale1": Part(f"{name}.layer_scale1.lambda1", (width,)),
        "norm2": vit.norm(f"{name}.norm2", width),
        "mlp": vit.mlp(f"{name}.mlp", design),
        "scale2": Part(f"{name}.layer_scale2.lambda1", (width,)),
    }
