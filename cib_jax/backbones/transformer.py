"""What the vision transformers share: from images to tokens, attention, and blocks (arXiv 2010.11929).

Kernels are matrices [inputs, outputs]. Layer norms and softmaxes are taken in float32; all else is of the images'
dtype, if the parameters have it too.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.backbones import convolution, positions

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
    return convolution.in_chunks(function, images, CHUNK_TOKENS // max(1, patches))


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
        """Returns the normalised tokens, in their dtype."""
        single = x.astype(jnp.float32)
        centred = single - jnp.mean(single, axis=-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
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
    """Attention and an MLP, each on normalised tokens and added to them."""

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
        placed = positions.interpolate(grid, rows, columns, antialias=self.design.antialias)
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
