"""CLIP's image towers, ViT-B/32 and ViT-B/16, up to the embedding that images and texts share (arXiv 2103.00020)."""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.models import vit
from cib_jax.models.state_dict import Tree
from cib_jax.models.vit import (
    MLP,
    Attention,
    Block,
    Design,
    LayerNorm,
    Layout,
    Linear,
    Part,
    Stem,
    drawn,
    gelu_by_sigmoid,
    gelu_by_tanh,
    in_chunks,
)

# backbones.clip: CLIP's image towers, ViT-B/32 and ViT-B/16, up to the embedding that images and texts share (arXiv 2103.00020).


FEATURES = 512  # of the shared embedding
CLIP_READS = ("vision_model.", "visual_projection.")


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
        """Returns the embeddings of normalized images, not of unit length, in their dtype if the parameters have it.

        Raises:
            ValueError: if the images cannot be cut into whole patches.
        """
        return in_chunks(self._features, images, self.design)

    def _features(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch 512"]:
        x = self.first_norm(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm(x[:, 0]))


def convert_clip(tensors: Mapping[str, np.ndarray], design: Design) -> Tree:
    """Returns the state of `CLIP` from tensors in the names of `transformers`, as published on the Hugging Face hub.

    The published files hold the text tower too: `READS` says how the names of the others begin.

    Raises:
        MismatchError: if tensors are missing, unknown or of another shape.
    """
    # The numbers 0, 1, 2, …, which older versions of `transformers` stored.
    return vit.fill(clip_parameters(design), tensors, {"vision_model.embeddings.position_ids"})


def clip_parameters(design: Design) -> Layout:
    """Returns where each parameter lies in the published file."""
    width = design.width
    stem = {
        "patches": vit.patches("vision_model.embeddings.patch_embedding", design),
        "class_token": Part("vision_model.embeddings.class_embedding", (width,)),
        "positions": Part("vision_model.embeddings.position_embedding.weight", (design.positions, width)),
    }
    blocks = {i: vit.clip_block(f"vision_model.encoder.layers.{i}", design) for i in range(design.depth)}
    return {
        "stem": stem,
        "first_norm": vit.norm("vision_model.pre_layrnorm", width),  # so spelled in the files
        "blocks": blocks,
        "norm": vit.norm("vision_model.post_layernorm", width),
        "projection": vit.linear("visual_projection", width, FEATURES, bias=False),
    }


# backbones.siglip: SigLIP's image tower, ViT-B/16, up to the embedding that images and texts share (arXiv 2303.15343).


SIGLIP_READS = ("vision_model.",)
BASE = Design(
    patch=16,
    grid=14,
    width=768,
    heads=12,
    epsilon=1e-6,
    activation=gelu_by_tanh,
    class_token=False,
)


class Pool(nnx.Module):
    """One learned query that gathers from all tokens, then an MLP (arXiv 2106.04560, appendix D)."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.query = drawn(rngs, design.width)
        self.attention = Attention(rngs, design)
        self.norm = LayerNorm(design.width, design.epsilon)
        self.mlp = MLP(rngs, design)

    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        """Returns one vector per image."""
        queries = jnp.broadcast_to(self.query[...], (tokens.shape[0], 1, tokens.shape[2]))
        x = self.attention(queries, tokens)[:, 0]
        return x + self.mlp(self.norm(x))


class SigLIP(nnx.Module):
    """The image tower with its pool; it takes any multiples of 16 pixels."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.stem = Stem(rngs, design)
        self.blocks = nnx.List([Block(rngs, design) for _ in range(design.depth)])
        self.norm = LayerNorm(design.width, design.epsilon)
        self.pool = Pool(rngs, design)
        self.design = design

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch width"]:
        """Returns the embeddings of normalized images, not of unit length, in their dtype if the parameters have it.

        Raises:
            ValueError: if the images are not multiples of 16 pixels high and wide.
        """
        return in_chunks(self._features, images, self.design)

    def _features(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch width"]:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.pool(self.norm(x))


def convert_siglip(tensors: Mapping[str, np.ndarray], design: Design) -> Tree:
    """Returns the state of `SigLIP` from tensors in the names of `transformers`, as published on the Hugging Face hub.

    The published file holds the text tower too: `READS` says how the names of the others begin.

    Raises:
        MismatchError: if tensors are missing, unknown or of another shape.
    """
    return vit.fill(siglip_parameters(design), tensors, set())


def siglip_parameters(design: Design) -> Layout:
    """Returns where each parameter lies in the published file."""
    width = design.width
    stem = {
        "patches": vit.patches("vision_model.embeddings.patch_embedding", design),
        "positions": Part("vision_model.embeddings.position_embedding.weight", (design.positions, width)),
    }
    blocks = {i: vit.clip_block(f"vision_model.encoder.layers.{i}", design) for i in range(design.depth)}
    pool = {
        "query": Part("vision_model.head.probe", (1, 1, width), np.ravel),
        "attention": _pool_attention("vision_model.head.attention", width),
        "norm": vit.norm("vision_model.head.layernorm", width),
        "mlp": vit.mlp("vision_model.head.mlp", design),
    }
    return {"stem": stem, "blocks": blocks, "norm": vit.norm("vision_model.post_layernorm", width), "pool": pool}


def _pool_attention(name: str, width: int) -> Layout:
    """PyTorch's own attention keeps the kernels of query, key and value in one tensor, one above the other."""

    def third(i: int, tensor: np.ndarray) -> np.ndarray:
        return tensor[i * width : (i + 1) * width].T

    parts: Layout = {
        ours: {
            "kernel": Part(f"{name}.in_proj_weight", (3 * width, width), functools.partial(third, i)),
            "bias": Part(f"{name}.in_proj_bias", (3 * width,), functools.partial(third, i)),
        }
        for i, ours in enumerate(("query", "key", "value"))
    }
    return parts | {"out": vit.linear(f"{name}.out_proj", width, width)}
