"""DINOv2's vision transformers, with and without registers (arXiv 2304.07193, 2309.16588)."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Float

from cib_jax.models import vit
from cib_jax.models.state_dict import Tree
from cib_jax.models.vit import Design, Layout, Part, VisionTransformer

# Trained at 518 pixels. As in Hugging Face's `transformers`, position embeddings are filtered on the way to smaller
# grids only in the networks with registers.
SMALL = Design(14, 37, 384, 6, 1e-6, vit.gelu, layer_scale=True)
BASE = SMALL._replace(width=768, heads=12)
SMALL_REGISTERS, BASE_REGISTERS = (design._replace(registers=4, antialias=True) for design in (SMALL, BASE))
ATTENTION = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
}


class DINOv2(VisionTransformer):
    """The network up to the class token after the last layer norm."""

    def _features(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch width"]:
        return self.norm(self._tokens(images)[:, 0])


def convert(tensors: Mapping[str, np.ndarray], design: Design) -> Tree:
    """Returns the state of `DINOv2` from tensors in the names of Hugging Face's `transformers`."""
    # The mask token replaces hidden patches in pretraining only.
    return vit.fill(_layout(design), tensors, {"embeddings.mask_token"})


def _layout(design: Design) -> Layout:
    width = design.width
    stem: Layout = {
        "patches": vit.patches("embeddings.patch_embeddings.projection", design),
        "class_token": Part("embeddings.cls_token", (1, 1, width), np.ravel),
        "positions": Part("embeddings.position_embeddings", (1, design.positions, width), np.squeeze),
    }
    if design.registers:
        stem["registers"] = Part("embeddings.register_tokens", (1, design.registers, width), np.squeeze)
    blocks = vit.blocks("encoder.layer", design, "norm", ATTENTION)
    return {"stem": stem, "blocks": blocks, "norm": vit.norm("layernorm", width)}
