"""The image towers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343).

Both end with the embedding that images and texts share, before it is scaled to unit length. Published files contain the
text tower too; `CLIP_READS` and `SIGLIP_READS` are the beginnings of the names of the image tower's tensors.
"""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.models import vit
from cib_jax.models.state_dict import Tree
from cib_jax.models.vit import MLP, Attention, Design, LayerNorm, Layout, Linear, Part, VisionTransformer

FEATURES = 512  # channels of CLIP's shared embedding
CLIP_READS = ("vision_model.", "visual_projection.")
SIGLIP_READS = ("vision_model.",)
ATTENTION = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
}


B32 = Design(32, 7, 768, 12, 1e-5, vit.gelu_by_sigmoid, patch_bias=False, first_norm=True)
B16 = B32._replace(patch=16, grid=14)
SIGLIP_B16 = Design(16, 14, 768, 12, 1e-6, vit.gelu_by_tanh, class_token=False)


class CLIP(VisionTransformer):
    """CLIP's image tower with its projection."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        super().__init__(rngs, design)
        self.projection = Linear(rngs, design.width, FEATURES, bias=False)

    def _features(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch 512"]:
        return self.projection(self.norm(self._tokens(images)[:, 0]))


class Pool(nnx.Module):
    """Attention of one learned query to all tokens, then an MLP (arXiv 2106.04560, appendix D)."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.query = vit.drawn(rngs, design.width)
        self.attention = Attention(rngs, design)
        self.norm = LayerNorm(design.width, design.epsilon)
        self.mlp = MLP(rngs, design)

    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        """Returns one vector per image."""
        queries = jnp.broadcast_to(self.query[...], (tokens.shape[0], 1, tokens.shape[2]))
        x = self.attention(queries, tokens)[:, 0]
        return x + self.mlp(self.norm(x))


class SigLIP(VisionTransformer):
    """SigLIP's image tower with its pool in place of a class token."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        super().__init__(rngs, design)
        self.pool = Pool(rngs, design)

    def _features(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch width"]:
        return self.pool(self.norm(self._tokens(images)))


def convert_clip(tensors: Mapping[str, np.ndarray], design: Design) -> Tree:
    """Returns the state of `CLIP` from tensors in the names of Hugging Face's `transformers`."""
    layout = _layout(design) | {"projection": vit.linear("visual_projection", design.width, FEATURES, bias=False)}
    layout["stem"]["class_token"] = Part("vision_model.embeddings.class_embedding", (design.width,))
    layout["first_norm"] = vit.norm("vision_model.pre_layrnorm", design.width)  # spelled so in the files
    # Older versions of `transformers` stored the numbers 0, 1, 2, … under this name.
    return vit.fill(layout, tensors, {"vision_model.embeddings.position_ids"})


def convert_siglip(tensors: Mapping[str, np.ndarray], design: Design) -> Tree:
    """Returns the state of `SigLIP` from tensors in the names of Hugging Face's `transformers`."""
    head = "vision_model.head"
    pool = {
        "query": Part(f"{head}.probe", (1, 1, design.width), np.ravel),
        "attention": _pool_attention(f"{head}.attention", design.width),
        "norm": vit.norm(f"{head}.layernorm", design.width),
        "mlp": vit.mlp(f"{head}.mlp", design),
    }
    return vit.fill(_layout(design) | {"pool": pool}, tensors, set())


def _layout(design: Design) -> Layout:
    """Returns the layout of the layers that both towers have."""
    stem = {
        "patches": vit.patches("vision_model.embeddings.patch_embedding", design),
        "positions": Part("vision_model.embeddings.position_embedding.weight", (design.positions, design.width)),
    }
    blocks = vit.blocks("vision_model.encoder.layers", design, "layer_norm", ATTENTION)
    return {"stem": stem, "blocks": blocks, "norm": vit.norm("vision_model.post_layernorm", design.width)}


def _pool_attention(name: str, width: int) -> Layout:
    """Returns the layout of `torch.nn.MultiheadAttention`, which stacks the kernels of query, key and value."""

    def third(i: int, tensor: np.ndarray) -> np.ndarray:
        return np.split(tensor, 3)[i].T

    parts: Layout = {
        ours: {
            "kernel": Part(f"{name}.in_proj_weight", (3 * width, width), functools.partial(third, i)),
            "bias": Part(f"{name}.in_proj_bias", (3 * width,), functools.partial(third, i)),
        }
        for i, ours in enumerate(("query", "key", "value"))
    }
    return parts | {"out": vit.linear(f"{name}.out_proj", width, width)}
