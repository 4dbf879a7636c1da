"""CLIP's image towers, ViT-B/32 and ViT-B/16, up to the embedding that images and texts share (arXiv 2103.00020)."""

from collections.abc import Mapping

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.backbones import layout
from cib_jax.backbones.layout import Layout, Part
from cib_jax.backbones.tensors import Tree
from cib_jax.backbones.transformer import Block, Design, LayerNorm, Linear, Stem, gelu_by_sigmoid, in_chunks

FEATURES = 512  # of the shared embedding
READS = ("vision_model.", "visual_projection.")


def _design(patch: int) -> Design:
    return Design(
        patch=patch,
        grid=224 // patch,
        width=768,
        heads=12,
        epsilon=1e-5,
        activation=gelu_by_sigmoid,
        patch_bias=False,
    )


B32 = _design(32)
B16 = _design(16)


class CLIP(nnx.Module):
    """The image tower with its projection; it takes any multiples of a patch's side."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.stem = Stem(rngs, design)
        self.first_norm = LayerNorm(design.width, design.epsilon)
        self.blocks = nnx.List([Block(rngs, design) for _ in range(design.depth)])
        self.norm = LayerNorm(design.width, design.epsilon)
        self.projection = Linear(rngs, design.width, FEATURES, bias=False)
        self.design = design

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch 512"]:
        """Returns the embeddings of normalised images, not of unit length, in their dtype if the parameters have it.

        Raises:
            ValueError: if the images cannot be cut into whole patches.
        """
        return in_chunks(self._features, images, self.design)

    def _features(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch 512"]:
        x = self.first_norm(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm(x[:, 0]))


def convert(tensors: Mapping[str, np.ndarray], design: Design) -> Tree:
    """Returns the state of `CLIP` from tensors in the names of `transformers`, as published on the Hugging Face hub.

    The published files hold the text tower too: `READS` says how the names of the others begin.

    Raises:
        MismatchError: if tensors are missing, unknown or of another shape.
    """
    # The numbers 0, 1, 2, …, which older versions of `transformers` stored.
    return layout.fill(published(design), tensors, {"vision_model.embeddings.position_ids"})


def published(design: Design) -> Layout:
    """Returns where each parameter lies in the published file."""
    width = design.width
    stem = {
        "patches": layout.patches("vision_model.embeddings.patch_embedding", design),
        "class_token": Part("vision_model.embeddings.class_embedding", (width,)),
        "positions": Part("vision_model.embeddings.position_embedding.weight", (design.positions, width)),
    }
    blocks = {i: layout.clip_block(f"vision_model.encoder.layers.{i}", design) for i in range(design.depth)}
    return {
        "stem": stem,
        "first_norm": layout.norm("vision_model.pre_layrnorm", width),  # so spelled in the files
        "blocks": blocks,
        "norm": layout.norm("vision_model.post_layernorm", width),
        "projection": layout.linear("visual_projection", width, FEATURES, bias=False),
    }
