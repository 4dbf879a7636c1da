"""Vision transformers (arXiv 2010.11929): position embeddings, layers, the network, and the layout of published files.

Kernels are matrices [inputs, outputs]. Layer norms and softmaxes are computed in float32; everything else has the dtype
of the images, which must be the dtype of the parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float

from cib_jax.models import conv
from cib_jax.models.state_dict import Shape, Tree, as_float32, validate_shapes

CHUNK_TOKENS = 2**9  # tokens that a CPU takes through a network at once; with fewer, reading the weights takes longest
WIDENING = 4  # channels inside an MLP / channels of a token
DEVIATION = 0.02  # standard deviation of random weights, as in the code of the paper


class Design(NamedTuple):
    """The sizes and options in which vision transformers differ."""

    patch: int  # side of a patch in pixels
    grid: int  # patches along a side of the images for which the position embeddings were learned
    width: int  # channels of a token
    heads: int
    epsilon: float  # added to the variance by the layer norms
    activation: Callable[[Array], Array]
    depth: int = 12  # number of blocks
    layer_scale: bool = False  # whether the output of attention and MLP is scaled channel by channel
    class_token: bool = True  # whether a learned token comes before the patches
    registers: int = 0  # additional learned tokens, without positions
    patch_bias: bool = True
    first_norm: bool = False  # whether a layer norm comes before the blocks
    antialias: bool = False  # whether position embeddings are filtered on the way to a smaller grid

    @property
    def positions(self) -> int:
        """The number of position embeddings."""
        return self.grid**2 + self.class_token


def gelu(x: Array) -> Array:
    """Returns x Φ(x). `jax.nn.gelu` computes it by erfc, which takes three times as long on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def gelu_by_tanh(x: Array) -> Array:
    """Returns the approximation of x Φ(x) by tanh."""
    return jax.nn.gelu(x, approximate=True)


def gelu_by_sigmoid(x: Array) -> Array:
    """Returns the approximation x σ(1.702 x) of x Φ(x), CLIP's "quick GELU"."""
    return x * jax.nn.sigmoid(1.702 * x)


def attend(
    queries: Float[Array, "batch tokens width"],
    keys: Float[Array, "batch others width"],
    values: Float[Array, "batch others width"],
    heads: int,
) -> Float[Array, "batch tokens width"]:
    """Returns softmax(q kᵀ / √d) v for every head of d channels, with the heads side by side."""

    def by_head(x: Array) -> Float[Array, "batch heads tokens channels"]:
        # Transposed first, so that both products are plain batched matrix products. On a CPU this takes half the time
        # of `jax.nn.dot_product_attention`.
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    q, k, v = by_head(queries), by_head(keys), by_head(values)
    logits = jnp.matmul(q * q.shape[-1] ** -0.5, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    gathered = jax.nn.softmax(logits, axis=-1).astype(v.dtype) @ v
    return gathered.transpose(0, 2, 1, 3).reshape(queries.shape)


class Linear(nnx.Module):
    """A linear layer: a `kernel` [inputs, outputs] and, optionally, a `bias` [outputs]."""

    def __init__(self, rngs: nnx.Rngs, inputs: int, outputs: int, *, bias: bool = True):
        self.kernel = drawn(rngs, inputs, outputs)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        """Returns x times the kernel, plus the bias."""
        y = x @ self.kernel[...]
        return y if self.bias is None else y + _of_rank(y, self.bias)


def _of_rank(x: Float[Array, "..."], channels: nnx.Param[Array]) -> Float[Array, "..."]:
    """Returns one value per channel with as many axes as `x` has, since broadcasting over fewer may be forbidden."""
    return channels[...].reshape((1,) * (x.ndim - 1) + (-1,))


class LayerNorm(nnx.Module):
    """Normalizes each token to mean 0 and variance 1 over its channels, then scales and shifts it."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Returns the normalized tokens, in their dtype."""
        single = x.astype(jnp.float32)
        centered = single - jnp.mean(single, axis=-1, keepdims=True)
        unit = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + self.epsilon)
        return (unit * _of_rank(x, self.scale) + _of_rank(x, self.bias)).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention of queries to tokens, or of tokens to themselves."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.query, self.key, self.value, self.out = (Linear(rngs, design.width, design.width) for _ in range(4))
        self.heads = design.heads

    def __call__(
        self, queries: Float[Array, "batch tokens width"], tokens: Float[Array, "batch others width"]
    ) -> Float[Array, "batch tokens width"]:
        """Returns the projected outputs of all heads, one per query."""
        return self.out(attend(self.query(queries), self.key(tokens), self.value(tokens), self.heads))


class MLP(nnx.Module):
    """Two linear layers with the activation between them."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.hidden = Linear(rngs, design.width, WIDENING * design.width)
        self.out = Linear(rngs, WIDENING * design.width, design.width)
        self.activation = design.activation

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Applies the layers to each token."""
        return self.out(self.activation(self.hidden(x)))


class Block(nnx.Module):
    """Attention and an MLP, each applied to normalized tokens and added to the tokens."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.norm1 = LayerNorm(design.width, design.epsilon)
        self.attention = Attention(rngs, design)
        self.scale1 = nnx.Param(jnp.ones(design.width, jnp.float32)) if design.layer_scale else None
        self.norm2 = LayerNorm(design.width, design.epsilon)
        self.mlp = MLP(rngs, design)
        self.scale2 = nnx.Param(jnp.ones(design.width, jnp.float32)) if design.layer_scale else None

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Applies the block."""
        normal = self.norm1(x)
        y = self.attention(normal, normal)
        x = x + (y if self.scale1 is None else y * _of_rank(y, self.scale1))
        y = self.mlp(self.norm2(x))
        return x + (y if self.scale2 is None else y * _of_rank(y, self.scale2))


class Stem(nnx.Module):
    """From images to tokens: a linear layer per patch, position embeddings, and learned tokens before the patches."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.patches = Linear(rngs, 3 * design.patch**2, design.width, bias=design.patch_bias)
        self.class_token = drawn(rngs, design.width) if design.class_token else None
        self.registers = drawn(rngs, design.registers, design.width) if design.registers else None
        self.positions = drawn(rngs, design.positions, design.width)
        self.design = design

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch tokens width"]:
        """Returns the class token and the registers, if the design has them, and the patches row by row."""
        side, width = self.design.patch, self.design.width
        batch, height, broad, _ = images.shape
        if height % side or broad % side:
            raise ValueError(
                f"images must be multiples of {side} pixels high and wide, the side of a patch, got {height} × "
                f"{broad}; resize them"
            )
        rows, columns = height // side, broad // side
        pixels = images.reshape(batch, rows, side, columns, side, 3).swapaxes(2, 3)
        patches = self.patches(pixels.reshape(batch, rows * columns, -1))
        learned, ahead = self.positions[...], int(self.design.class_token)
        grid = learned[ahead:].reshape(self.design.grid, self.design.grid, width)
        placed = interpolate(grid, rows, columns, antialias=self.design.antialias)
        parts = [patches + placed.reshape(1, -1, width).astype(images.dtype)]
        if self.registers is not None:
            parts.insert(0, jnp.broadcast_to(self.registers[...], (batch, *self.registers.shape)))
        if self.class_token is not None:
            parts.insert(0, jnp.broadcast_to(self.class_token[...] + learned[0], (batch, 1, width)))
        return jnp.concatenate(parts, axis=1)


class VisionTransformer(nnx.Module):
    """The stem, the blocks and a layer norm; a subclass defines `_features` in terms of `_tokens`."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        # In the order in which images pass them, on which fine-tuning of the last blocks relies.
        self.stem = Stem(rngs, design)
        self.first_norm = LayerNorm(design.width, design.epsilon) if design.first_norm else None
        self.blocks = nnx.List([Block(rngs, design) for _ in range(design.depth)])
        self.norm = LayerNorm(design.width, design.epsilon)
        self.design = design

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch features"]:
        """Returns the features of normalized images; their sides can be any multiples of a patch's."""
        patches = images.shape[1] * images.shape[2] // self.design.patch**2
        return conv.in_chunks(self._features, images, CHUNK_TOKENS // max(1, patches))

    def _features(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch features"]:
        raise NotImplementedError

    def _tokens(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch tokens width"]:
        x = self.stem(images)
        return conv.in_turn(self.blocks, x if self.first_norm is None else self.first_norm(x))


def drawn(rngs: nnx.Rngs, *shape: int) -> nnx.Param[Array]:
    """Returns random weights from a normal distribution, truncated at two standard deviations."""
    if isinstance(rngs, conv.ShapesOnly):
        return nnx.Param(jnp.zeros(shape, jnp.float32))
    return nnx.Param(jax.nn.initializers.truncated_normal(DEVIATION)(rngs.params(), shape, jnp.float32))


# Position embeddings at other image sizes.


def interpolate(
    grid: Float[Array, "rows columns width"], rows: int, columns: int, *, antialias: bool
) -> Float[Array, "rows2 columns2 width"]:
    """Returns the grid with another number of rows and columns, in float32.

    Equivalent to `torch.nn.functional.interpolate(mode="bicubic", align_corners=False, antialias=antialias)`, by which
    the published networks take images of other sizes than those of training.
    """
    if grid.shape[:2] == (rows, columns):
        return grid.astype(jnp.float32)
    down = jnp.asarray(bicubic(grid.shape[0], rows, antialias=antialias), jnp.float32)
    across = jnp.asarray(bicubic(grid.shape[1], columns, antialias=antialias), jnp.float32)
    return jnp.einsum("jw,iwc->ijc", across, jnp.einsum("ih,hwc->iwc", down, grid.astype(jnp.float32)))


def bicubic(inputs: int, outputs: int, *, antialias: bool) -> np.ndarray:
    """Returns the matrix [outputs, inputs] of the interpolation along one axis, in float64.

    Without `antialias`, the cubic has the sharpness −0.75 and is one input wide at any ratio; inputs beyond the border
    equal the border. With it, as in Pillow, the sharpness is −0.5, the cubic is as wide as an output when shrinking,
    and inputs beyond the border have no weight.
    """
    ratio = inputs / outputs
    centers = (np.arange(outputs) + 0.5) * ratio - 0.5
    wide = max(ratio, 1.0) if antialias else 1.0
    beyond = 2  # inputs beyond the border that the cubic reaches
    distances = np.abs(np.arange(-beyond, inputs + beyond) - centers[:, None]) / wide
    weights = _cubic(distances, -0.5 if antialias else -0.75)
    inside = weights[:, beyond:-beyond].copy()
    if antialias:
        return inside / inside.sum(1, keepdims=True)
    inside[:, 0] += weights[:, :beyond].sum(1)
    inside[:, -1] += weights[:, -beyond:].sum(1)
    return inside


def _cubic(x: np.ndarray, sharpness: float) -> np.ndarray:
    """Returns Keys' convolution kernel (IEEE Trans. ASSP 29, 1981) at distances x ≥ 0."""
    near = ((sharpness + 2) * x - (sharpness + 3)) * x**2 + 1
    far = sharpness * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


# The names, shapes and order of a published file's tensors.


class Part(NamedTuple):
    """The tensor in a file that holds one parameter."""

    name: str
    shape: Shape
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray  # from the tensor to the parameter


Layout = dict[Any, Any]  # a network's state with a `Part` in place of each array


def fill(layout: Layout, tensors: Mapping[str, np.ndarray], extra: set[str]) -> Tree:
    """Returns a network's state in float32; the tensors may include `extra` ones, which are not in the layout."""
    parts = traverse_util.flatten_dict(layout)
    validate_shapes(tensors, {part.name: part.shape for part in parts.values()}, extra)
    arrays = {path: as_float32(part.convert(tensors[part.name])) for path, part in parts.items()}
    return traverse_util.unflatten_dict(arrays)


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Layout:
    """Returns the layout of a linear layer; PyTorch's kernels are [outputs, inputs]."""
    kernel: Layout = {"kernel": Part(f"{name}.weight", (outputs, inputs), np.transpose)}
    return kernel | ({"bias": Part(f"{name}.bias", (outputs,))} if bias else {})


def norm(name: str, width: int) -> Layout:
    """Returns the layout of a layer norm."""
    return {"scale": Part(f"{name}.weight", (width,)), "bias": Part(f"{name}.bias", (width,))}


def patches(name: str, design: Design) -> Layout:
    """Returns the layout of the linear layer of patches, which is a convolution in PyTorch."""

    def as_matrix(kernel: np.ndarray) -> np.ndarray:
        return kernel.transpose(2, 3, 1, 0).reshape(-1, design.width)

    kernel: Layout = {"kernel": Part(f"{name}.weight", (design.width, 3, design.patch, design.patch), as_matrix)}
    return kernel | ({"bias": Part(f"{name}.bias", (design.width,))} if design.patch_bias else {})


def blocks(prefix: str, design: Design, norms: str, attention: Mapping[str, str]) -> Layout:
    """Returns the layout of all blocks, from the names of a layer norm without its number, and of the linear layers."""
    width = design.width
    made: Layout = {}
    for number in range(design.depth):
        name = f"{prefix}.{number}"
        made[number] = {
            "norm1": norm(f"{name}.{norms}1", width),
            "attention": {ours: linear(f"{name}.{theirs}", width, width) for ours, theirs in attention.items()},
            "norm2": norm(f"{name}.{norms}2", width),
            "mlp": mlp(f"{name}.mlp", design),
        }
        if design.layer_scale:
            made[number] |= {f"scale{i}": Part(f"{name}.layer_scale{i}.lambda1", (width,)) for i in (1, 2)}
    return made


def mlp(name: str, design: Design) -> Layout:
    """Returns the layout of an MLP."""
    return {
        "hidden": linear(f"{name}.fc1", design.width, WIDENING * design.width),
        "out": linear(f"{name}.fc2", WIDENING * design.width, design.width),
    }
