"""Position embeddings learned on one grid of patches, brought to another as PyTorch's bicubic interpolation does it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.models import conv
from cib_jax.models.state_dict import Shape, Tree, validate_shapes

# backbones.positions: Position embeddings learned on one grid of patches, brought to another as PyTorch's bicubic interpolation does it.


def interpolate(
    grid: Float[Array, "rows columns width"], rows: int, columns: int, *, antialias: bool
) -> Float[Array, "rows2 columns2 width"]:
    """Returns the grid with another number of rows and columns, in float32.

    As `torch.nn.functional.interpolate(mode="bicubic", align_corners=False, antialias=antialias)` gives it.
    """
    if grid.shape[:2] == (rows, columns):
        return grid.astype(jnp.float32)
    down = jnp.asarray(bicubic(grid.shape[0], rows, antialias=antialias), jnp.float32)
    across = jnp.asarray(bicubic(grid.shape[1], columns, antialias=antialias), jnp.float32)
    return jnp.einsum("jw,iwc->ijc", across, jnp.einsum("ih,hwc->iwc", down, grid.astype(jnp.float32)))


def bicubic(inputs: int, outputs: int, *, antialias: bool) -> np.ndarray:
    """Returns the matrix [outputs, inputs] of the interpolation along one axis, in float64.

    Without `antialias` the cubic has the sharpness −0.75, is one input wide whatever the ratio, and what lies outside
    counts as the border. With it, as in Pillow: −0.5, as wide as an output where that is wider, and what lies outside
    does not count.
    """
    ratio = inputs / outputs
    centers = (np.arange(outputs) + 0.5) * ratio - 0.5
    wide = max(ratio, 1.0) if antialias else 1.0
    beyond = 2  # how far the cubic reaches over the border
    distances = np.abs(np.arange(-beyond, inputs + beyond) - centers[:, None]) / wide
    weights = _cubic(distances, -0.5 if antialias else -0.75)
    inside = weights[:, beyond:-beyond].copy()
    if antialias:
        return inside / inside.sum(1, keepdims=True)
    inside[:, 0] += weights[:, :beyond].sum(1)
    inside[:, -1] += weights[:, -beyond:].sum(1)
    return inside


def _cubic(x: np.ndarray, sharpness: float) -> np.ndarray:
    """Keys' convolution kernel (IEEE Trans. ASSP 29, 1981) at distances x ≥ 0."""
    near = ((sharpness + 2) * x - (sharpness + 3)) * x**2 + 1
    far = sharpness * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


# backbones.transformer: What the vision transformers share: from images to tokens, attention, and blocks (arXiv 2010.11929).
#
# Kernels are matrices [inputs, outputs]. Layer norms and softmaxes are taken in float32; all else is of the images'
# dtype, if the parameters have it too.


CHUNK_TOKENS = 2**9  # that a CPU takes through a network together: fewer, and it waits for the weights to be read
DEVIATION = 0.02  # of random weights, as in the paper's own code and those after it


class Design(NamedTuple):
    """What sets one vision transformer apart from another."""

    patch: int  # side of a patch in pixels
    grid: int  # patches along a side where the position embeddings were learned
    width: int  # of a token
    heads: int
    epsilon: float  # of the layer norms
    activation: Callable[[Array], Array]
    depth: int = 12  # blocks
    layer_scale: bool = False  # whether what a block adds is scaled, channel by channel
    class_token: bool = True  # whether a learned token goes before the patches
    registers: int = 0  # learned tokens more, without positions
    patch_bias: bool = True
    antialias: bool = False  # how position embeddings are brought to another grid

    @property
    def hidden(self) -> int:
        """The width inside the MLPs."""
        return 4 * self.width

    @property
    def positions(self) -> int:
        """How many position embeddings there are."""
        return self.grid**2 + self.class_token


def gelu(x: Array) -> Array:
    """Returns x Φ(x) by the error function; JAX's own goes by its complement, which takes a CPU three times as long."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def gelu_by_tanh(x: Array) -> Array:
    """Returns the approximation of x Φ(x) by a hyperbolic tangent."""
    return jax.nn.gelu(x, approximate=True)


def gelu_by_sigmoid(x: Array) -> Array:
    """Returns the approximation x σ(1.702 x) of x Φ(x), which CLIP calls quick."""
    return x * jax.nn.sigmoid(1.702 * x)


def in_chunks(
    function: Callable[[Float[Array, "images h w 3"]], Float[Array, "images width"]],
    images: Float[Array, "batch h w 3"],
    design: Design,
) -> Float[Array, "batch width"]:
    """Returns `function(images)`, which must treat every image by itself, on a CPU a few images at a time."""
    patches = images.shape[1] * images.shape[2] // design.patch**2
    return conv.in_chunks(function, images, CHUNK_TOKENS // max(1, patches))


def attend(
    queries: Float[Array, "batch tokens width"],
    keys: Float[Array, "batch others width"],
    values: Float[Array, "batch others width"],
    heads: int,
) -> Float[Array, "batch tokens width"]:
    """Returns what each query gathers: softmax(q kᵀ / √d) v in every head of d channels, heads side by side."""

    def by_head(x: Array) -> Float[Array, "batch heads tokens channels"]:
        # Ahead of the products, so that they are plain ones of matrices: half the time of JAX's own form on a CPU.
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    q, k, v = by_head(queries), by_head(keys), by_head(values)
    logits = jnp.matmul(q * q.shape[-1] ** -0.5, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    gathered = jax.nn.softmax(logits, axis=-1).astype(v.dtype) @ v
    return gathered.transpose(0, 2, 1, 3).reshape(queries.shape)


class Linear(nnx.Module):
    """A `kernel` [inputs, outputs] and, if wanted, a `bias`."""

    def __init__(self, rngs: nnx.Rngs, inputs: int, outputs: int, *, bias: bool = True):
        self.kernel = drawn(rngs, inputs, outputs)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        """Returns x times the kernel, plus the bias."""
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


class LayerNorm(nnx.Module):
    """Each token with mean 0 and variance 1 over its channels, then scaled and shifted."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Returns the normalized tokens, in their dtype."""
        single = x.astype(jnp.float32)
        centered = single - jnp.mean(single, axis=-1, keepdims=True)
        unit = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + self.epsilon)
        return (unit * self.scale[...] + self.bias[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Attention of several heads, of tokens among themselves or of queries to tokens."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.query, self.key, self.value, self.out = (Linear(rngs, design.width, design.width) for _ in range(4))
        self.heads = design.heads

    def __call__(
        self, queries: Float[Array, "batch tokens width"], tokens: Float[Array, "batch others width"]
    ) -> Float[Array, "batch tokens width"]:
        """Returns what each of the queries gathers from the tokens."""
        return self.out(attend(self.query(queries), self.key(tokens), self.value(tokens), self.heads))


class MLP(nnx.Module):
    """Two linear layers with the activation between them."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.hidden = Linear(rngs, design.width, design.hidden)
        self.out = Linear(rngs, design.hidden, design.width)
        self.activation = design.activation

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Applies the layers to each token."""
        return self.out(self.activation(self.hidden(x)))


class Block(nnx.Module):
    """Attention and an MLP, each on normalized tokens and added to them."""

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
        x = x + _scaled(self.attention(normal, normal), self.scale1)
        return x + _scaled(self.mlp(self.norm2(x)), self.scale2)


class Stem(nnx.Module):
    """From images to tokens: each patch through one linear layer, learned tokens ahead, and positions added."""

    def __init__(self, rngs: nnx.Rngs, design: Design):
        self.patches = Linear(rngs, 3 * design.patch**2, design.width, bias=design.patch_bias)
        self.class_token = drawn(rngs, design.width) if design.class_token else None
        self.registers = drawn(rngs, design.registers, design.width) if design.registers else None
        self.positions = drawn(rngs, design.positions, design.width)
        self.design = design

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch tokens width"]:
        """Returns the class token, the registers and the patches row by row, each where the design has them.

        Raises:
            ValueError: if the images cannot be cut into whole patches.
        """
        side, width = self.design.patch, self.design.width
        batch, height, broad, _ = images.shape
        if height % side or broad % side:
            raise ValueError(
                f"images are {height} × {broad} but are cut into patches of {side} × {side}: "
                f"resize them to multiples of {side} pixels."
            )
        rows, columns = height // side, broad // side
        pixels = images.reshape(batch, rows, side, columns, side, 3).swapaxes(2, 3)
        patches = self.patches(pixels.reshape(batch, rows * columns, -1))
        learned, ahead = self.positions[...], int(self.design.class_token)
        grid = learned[ahead:].reshape(self.design.grid, self.design.grid, width)
        placed = interpolate(grid, rows, columns, antialias=self.design.antialias)
        parts = [patches + placed.reshape(-1, width).astype(images.dtype)]
        if self.registers is not None:
            parts.insert(0, jnp.broadcast_to(self.registers[...], (batch, *self.registers.shape)))
        if self.class_token is not None:
            parts.insert(0, jnp.broadcast_to(self.class_token[...] + learned[0], (batch, 1, width)))
        return jnp.concatenate(parts, axis=1)


def drawn(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """Returns random weights: normal, cut off at two deviations."""
    return nnx.Param(jax.nn.initializers.truncated_normal(DEVIATION)(rngs.params(), shape, jnp.float32))


def _scaled(x: Float[Array, "... width"], scale: nnx.Param | None) -> Float[Array, "... width"]:
    return x if scale is None else x * scale[...]


# backbones.layout: Where the parameters of a vision transformer lie in a published file: names, shapes and how they become ours.


class Part(NamedTuple):
    """The tensor of one parameter: its name and shape in the file, and how the parameter comes from it."""

    name: str
    shape: Shape
    taken: Callable[[np.ndarray], np.ndarray] = np.asarray


Layout = dict[Any, Any]
"""A network's state with a `Part` in place of each array."""


def fill(layout: Layout, tensors: Mapping[str, np.ndarray], extra: set[str]) -> Tree:
    """Returns the state whose arrays lie in `tensors` as the layout says, in float32.

    Args:
        layout: of the network.
        tensors: of a file, by name.
        extra: names in the file that the network does without.

    Raises:
        MismatchError: if tensors are missing, unknown or of another shape.
    """
    validate_shapes(tensors, shapes(layout), extra)
    return _filled(layout, tensors)


def shapes(layout: Layout) -> dict[str, Shape]:
    """Returns the name and shape of every tensor that the network needs."""
    found: dict[str, Shape] = {}
    for part in layout.values():
        found |= {part.name: part.shape} if isinstance(part, Part) else shapes(part)
    return found


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Layout:
    """Returns where a linear layer lies; PyTorch keeps its kernel as [outputs, inputs]."""
    kernel: Layout = {"kernel": Part(f"{name}.weight", (outputs, inputs), np.transpose)}
    return kernel | ({"bias": Part(f"{name}.bias", (outputs,))} if bias else {})


def norm(name: str, width: int) -> Layout:
    """Returns where a layer norm lies."""
    return {"scale": Part(f"{name}.weight", (width,)), "bias": Part(f"{name}.bias", (width,))}


def patches(name: str, design: Design) -> Layout:
    """Returns where the layer of the patches lies; in PyTorch it is a convolution."""

    def as_matrix(kernel: np.ndarray) -> np.ndarray:
        return kernel.transpose(2, 3, 1, 0).reshape(-1, design.width)

    kernel: Layout = {"kernel": Part(f"{name}.weight", (design.width, 3, design.patch, design.patch), as_matrix)}
    return kernel | ({"bias": Part(f"{name}.bias", (design.width,))} if design.patch_bias else {})


def clip_block(name: str, design: Design) -> Layout:
    """Returns where a block lies in the names that CLIP and SigLIP share."""
    width = design.width
    attention = {
        ours: linear(f"{name}.self_attn.{theirs}", width, width)
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj"))
    }
    return {
        "norm1": norm(f"{name}.layer_norm1", width),
        "attention": attention,
        "norm2": norm(f"{name}.layer_norm2", width),
        "mlp": mlp(f"{name}.mlp", design),
    }


def mlp(name: str, design: Design) -> Layout:
    """Returns where an MLP lies."""
    return {
        "hidden": linear(f"{name}.fc1", design.width, design.hidden),
        "out": linear(f"{name}.fc2", design.hidden, design.width),
    }


def _filled(layout: Layout, tensors: Mapping[str, np.ndarray]) -> Tree:
    return {
        key: np.ascontiguousarray(part.taken(tensors[part.name]), dtype=np.float32)
        if isinstance(part, Part)
        else _filled(part, tensors)
        for key, part in layout.items()
    }
