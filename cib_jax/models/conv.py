"""Convolutions and pools, each in the form that is fastest on the platform of the program.

XLA's CPU backend computes depthwise and 1×1 convolutions and window maxima by generic loops, many times slower than the
same sums written as products, shifts and slices. On GPU and TPU, XLA's own forms are fast. `lax.platform_dependent`
chooses when a program is lowered, so that networks need not know. All forms give the same numbers up to rounding.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

Pads = Sequence[tuple[int, int]]
Padding = str | Pads
AXES = ("NHWC", "HWIO", "NHWC")
NO_PADS = ((0, 0), (0, 0))
COLUMN_CHANNELS = 4  # with as few inputs and a stride, XLA's form takes twice as long as one matrix product
WINOGRAD_CHANNELS = 128  # with fewer inputs or outputs, transforming the tiles costs what the products save
CHUNK_PIXELS = 2**17  # pixels that a CPU takes through a network at once: two images at 224 px, eight at 128
# Winograd's matrices Aᵀ, G and Bᵀ.
OF_OUTPUT = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))
OF_KERNEL = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
OF_DATA = ((1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0))


class ShapesOnly(nnx.Rngs):
    """Streams of random numbers for a network whose shapes alone are needed: tracing real draws takes a second."""


class Convolution(nnx.Module):
    """The parameters of a layer: `kernel` [height, width, inputs, outputs] and `bias` [outputs]."""

    def __init__(self, rngs: nnx.Rngs, *shape: int):
        """Draws the kernel as He et al. (arXiv 1502.01852) do for ReLUs; the bias is 0."""
        he_normal = jax.nn.initializers.he_normal()
        drawn = not isinstance(rngs, ShapesOnly)
        self.kernel = nnx.Param(
            he_normal(rngs.params(), shape, jnp.float32) if drawn else jnp.zeros(shape, jnp.float32)
        )
        self.bias = nnx.Param(jnp.zeros(shape[-1:], jnp.float32))

    @property
    def arrays(self) -> tuple[Array, Array]:
        """The kernel and the bias, in the order of the arguments of `conv`, `depthwise` and `pointwise`."""
        return self.kernel[...], self.bias[...]


def explicit_padding(
    size: Sequence[int], window: Sequence[int], stride: int, padding: Padding
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns ((top, bottom), (left, right)) for "SAME", "VALID" or padding that is already explicit.

    "SAME" is TensorFlow's rule: ceil(size / stride) outputs, with the odd row at the end, so that a 3×3 kernel with
    stride 2 pads an even size at its end only. PyTorch's padding of 1 is ((1, 1), (1, 1)).
    """
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding must be 'SAME', 'VALID' or ((top, bottom), (left, right)), got {padding!r}")
        padding = lax.padtype_to_pads(size, window, (stride, stride), padding)
    (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)


def conv(
    x: Float[Array, "batch h w inputs"],
    kernel: Float[Array, "kh kw inputs outputs"],
    bias: Float[Array, "outputs"],
    stride: int = 1,
    padding: Padding = "SAME",
) -> Float[Array, "batch h2 w2 outputs"]:
    """Returns the convolution of all inputs with every output's kernel, plus bias."""
    pads = explicit_padding(x.shape[1:3], kernel.shape[:2], stride, padding)
    plain = functools.partial(conv_plain, stride=stride, pads=pads)
    if stride > 1 and kernel.shape[2] <= COLUMN_CHANNELS:
        form: Callable[..., Array] = functools.partial(conv_by_columns, stride=stride, pads=pads)
    elif kernel.shape[:2] == (3, 3) and stride == 1 and min(kernel.shape[2:]) >= WINOGRAD_CHANNELS:
        form = functools.partial(winograd, pads=pads)
    else:
        form = lambda x, kernel: conv_for_loops(x, kernel, stride, pads)  # noqa: E731 - custom_vjp takes no keywords
    return _by_platform(form, plain, x, kernel) + bias.reshape(1, 1, 1, -1)


def depthwise(
    x: Float[Array, "batch h w channels"],
    kernel: Float[Array, "kh kw 1 channels"],
    bias: Float[Array, "channels"],
    stride: int = 1,
    padding: Padding = "SAME",
) -> Float[Array, "batch h2 w2 channels"]:
    """Returns the convolution of every channel with its own kernel, plus bias."""
    pads = explicit_padding(x.shape[1:3], kernel.shape[:2], stride, padding)
    shifts, plain = (functools.partial(form, stride=stride, pads=pads) for form in (depthwise_by_shifts, conv_plain))
    return _by_platform(shifts, plain, x, kernel) + bias.reshape(1, 1, 1, -1)


def pointwise(
    x: Float[Array, "batch h w inputs"],
    kernel: Float[Array, "1 1 inputs outputs"],
    bias: Float[Array, "outputs"],
) -> Float[Array, "batch h w outputs"]:
    """Returns the 1×1 convolution plus bias."""

    def product(x: Array, kernel: Array) -> Array:
        flat = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
        return flat.reshape(*x.shape[:-1], kernel.shape[-1])

    plain = functools.partial(conv_plain, stride=1, pads=NO_PADS)
    return _by_platform(product, plain, x, kernel) + bias.reshape(1, 1, 1, -1)


def max_pool_2x2(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h//2 w//2 channels"]:
    """Returns the maximum of every 2×2 square; an odd last row or column is dropped, as in PyTorch."""
    return _by_platform(max_pool_by_slices, max_pool_plain, x)


def max_pool_3x3(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch (h+1)//2 (w+1)//2 channels"]:
    """Returns the maximum of every 3×3 square at stride 2, as `torch.nn.MaxPool2d(3, stride=2, padding=1)`."""
    pads = ((1, 1), (1, 1))
    return _by_platform(lambda x: max_pool_by_slices(x, 3, pads), lambda x: max_pool_plain(x, 3, pads), x)


def in_chunks(
    function: Callable[[Float[Array, "images h w channels"]], Float[Array, "images ..."]],
    x: Float[Array, "batch h w channels"],
    most: int | None = None,
) -> Float[Array, "batch ..."]:
    """Returns `function(x)`, computed for a few images at a time on a CPU.

    The maps of a few images fit into the caches, and their memory is allocated once instead of once per layer. On other
    platforms the whole batch is computed at once. Chunks are equal: their size is the largest divisor of the batch up
    to `most`, by default the number of images that `CHUNK_PIXELS` allows.
    """
    batch, height, width, _ = x.shape
    most = max(1, CHUNK_PIXELS // (height * width) if most is None else most)
    size = max((n for n in range(1, most + 1) if batch % n == 0 and n <= batch), default=batch)
    if size == batch:
        return function(x)

    def chunk_by_chunk(x: Array) -> Array:
        y = lax.map(function, x.reshape(-1, size, *x.shape[1:]))
        return y.reshape(-1, *y.shape[2:])

    return _by_platform(chunk_by_chunk, function, x)


def in_turn(layers: Iterable[Callable[[Array], Array]], x: Array) -> Array:
    """Returns `x` after all layers, one after the other."""
    return functools.reduce(lambda x, layer: layer(x), layers, x)


def _by_platform(cpu: Callable[..., Array], default: Callable[..., Array], *arguments: Array) -> Array:
    return lax.platform_dependent(*arguments, cpu=cpu, default=default)


# The forms, without bias.


def conv_plain(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Returns the convolution in XLA's own form; a kernel [height, width, 1, channels] is depthwise."""
    groups = x.shape[-1] // kernel.shape[2]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=AXES, feature_group_count=groups
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_for_loops(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Returns `conv_plain` with gradients that are fast on a CPU inside a loop, such as that of `in_chunks`.

    The gradients that JAX derives are convolutions with permuted axes (batch and channels exchanged). XLA's CPU backend
    transposes them to the axes of its fast kernels, but not inside a loop, where it falls back to code that goes pixel
    by pixel, 30 to 100 times slower. Here the transposes are explicit, so that all convolutions have the axes `AXES`.
    """
    return conv_plain(x, kernel, stride, pads)


def _forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return conv_plain(x, kernel, stride, pads), (x, kernel)


def _backward(stride: int, pads: Pads, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    convolve = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=AXES)
    # With a stride, the windows may leave out the last rows or columns of an image: `reach` is what they cover.
    reach = [(outputs - 1) * stride + 1 for outputs in gradient.shape[1:3]]
    axes = list(zip(x.shape[1:3], kernel.shape[:2], reach, [pad[0] for pad in pads], strict=True))
    # ∂/∂x is the gradient, with zeros between its pixels for the stride, convolved with the kernel turned by 180°.
    of_x = convolve(
        gradient,
        kernel[::-1, ::-1].swapaxes(2, 3),
        padding=[(k - 1 - b, n + b - r) for n, k, r, b in axes],
        lhs_dilation=(stride, stride),
    )
    # ∂/∂kernel correlates x with the gradient: the channels of x act as a batch, the images as channels to be summed.
    of_kernel = convolve(
        x.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        padding=[(b, k - 1 + r - n - b) for n, k, r, b in axes],
        rhs_dilation=(stride, stride),
    )
    return of_x, of_kernel.transpose(1, 2, 0, 3)


conv_for_loops.defvjp(_forward, _backward)


def conv_by_columns(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Returns the convolution as one matrix product of the kernel and the pixels under it, copied side by side."""
    kh, kw, inputs, outputs = kernel.shape
    columns = jnp.concatenate(_shifted(x, (kh, kw), stride, pads), -1)
    flat = columns.reshape(-1, kh * kw * inputs) @ kernel.reshape(-1, outputs)
    return flat.reshape(*columns.shape[:3], outputs)


def depthwise_by_shifts(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Returns the depthwise convolution as a sum of shifted images, each times one tap of the kernel.

    XLA fuses the sum into one loop over the image, with the channels side by side. Its own form of a convolution with
    one channel per group has no such fast loop on a CPU.
    """
    taps = kernel.reshape(-1, kernel.shape[-1])
    images = _shifted(x, kernel.shape[:2], stride, pads)
    return functools.reduce(jnp.add, [image * tap for image, tap in zip(images, taps, strict=True)])


def _shifted(
    x: Array, window: Sequence[int], stride: int, pads: Pads, around: float = 0
) -> list[Float[Array, "batch h2 w2 channels"]]:
    """Returns the pixels under each tap of a window, row by row; `around` fills the padding."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=around)
    batch, height, width, channels = x.shape
    kh, kw = window
    last_row, last_column = (height - kh) // stride * stride, (width - kw) // stride * stride

    def under(i: int, j: int) -> Array:
        end = (batch, i + last_row + 1, j + last_column + 1, channels)
        return lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1))

    return [under(i, j) for i in range(kh) for j in range(kw)]


def max_pool_by_slices(x: Array, window: int = 2, pads: Pads = NO_PADS) -> Array:
    """Returns the maximum under a window at stride 2, as an elementwise maximum of strided slices.

    XLA fuses the maximum into one loop, forward and backward; its own form goes window by window, and its gradient is a
    scatter.
    """
    return functools.reduce(jnp.maximum, _shifted(x, (window, window), 2, pads, around=-jnp.inf))


def max_pool_plain(x: Array, window: int = 2, pads: Pads = NO_PADS) -> Array:
    """Returns the maximum under a window at stride 2, in XLA's own form."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, 2, 2, 1), ((0, 0), *pads, (0, 0)))


# Winograd's convolution.


def winograd(
    x: Float[Array, "batch h w inputs"], kernel: Float[Array, "3 3 inputs outputs"], pads: Pads
) -> Float[Array, "batch h2 w2 outputs"]:
    """Returns a 3×3 convolution of stride 1 with fewer multiplications: Winograd's F(2×2, 3×3).

    An image is cut into tiles of 4² pixels that overlap by two; each gives 2² outputs. Tiles and kernel are combined:
    Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A. The sum over channels becomes 16 matrix products: 16 instead of 36 multiplications
    for four outputs. F(4×4) multiplies less, but is slower within a network and has larger rounding errors.

    References:
      Lavin & Gray, Fast Algorithms for Convolutional Neural Networks (https://arxiv.org/abs/1509.09308).
    """
    height, width = (n + sum(pad) - 2 for n, pad in zip(x.shape[1:3], pads, strict=True))
    rows, columns = -(-height // 2), -(-width // 2)
    x = jnp.pad(x, ((0, 0), *((a, b + n % 2) for (a, b), n in zip(pads, (height, width), strict=True)), (0, 0)))
    batch, _, _, inputs = x.shape

    strips = [x[:, i : i + 2 * rows - 1 : 2] for i in range(4)]
    tiles = [
        value.reshape(-1, inputs)
        for strip in _combine(OF_DATA, strips)
        for value in _combine(OF_DATA, [strip[:, :, j : j + 2 * columns - 1 : 2] for j in range(4)])
    ]
    taps = [tap for row in _combine(OF_KERNEL, list(kernel)) for tap in _combine(OF_KERNEL, list(row))]
    # The barriers keep XLA from fusing the sums into the matrix products, which would compute a sum again for every
    # entry that reads it.
    products = lax.optimization_barrier([a @ b for a, b in zip(*lax.optimization_barrier((tiles, taps)), strict=True)])
    halves = [_combine(OF_OUTPUT, products[column::4]) for column in range(4)]
    lines = [jnp.stack(_combine(OF_OUTPUT, line), 1) for line in zip(*halves, strict=True)]
    y = jnp.stack([line.reshape(batch, rows, columns * 2, -1) for line in lines], 2)
    return y.reshape(batch, rows * 2, columns * 2, -1)[:, :height, :width]


def _combine(matrix: Sequence[Sequence[float]], arrays: Sequence[Array]) -> list[Array]:
    """Returns the product of a small matrix and a column of arrays, leaving out terms with a coefficient of 0."""
    sums = []
    for row in matrix:
        terms = [array if c == 1 else c * array for c, array in zip(row, arrays, strict=True) if c]
        sums.append(functools.reduce(jnp.add, terms))
    return sums
