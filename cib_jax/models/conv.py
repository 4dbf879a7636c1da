"""3×3 convolutions with fewer multiplications: Winograd's F(m×m, 3×3) after Lavin & Gray (arXiv 1509.09308).

An image is cut into tiles of (m + 2)² pixels that overlap by two; each gives m² outputs. Tiles and kernel are
transformed, Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A, so that the sum over channels becomes (m + 2)² matrix products: 16
multiplications instead of 36 for the four outputs of F(2×2), 36 instead of 144 for the sixteen of F(4×4)."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

# backbones.winograd: 3×3 convolutions with fewer multiplications: Winograd's F(m×m, 3×3) after Lavin & Gray (arXiv 1509.09308).
#
# An image is cut into tiles of (m + 2)² pixels that overlap by two; each gives m² outputs. Tiles and kernel are
# transformed, Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A, so that the sum over channels becomes (m + 2)² matrix products: 16
# multiplications instead of 36 for the four outputs of F(2×2), 36 instead of 144 for the sixteen of F(4×4).

# Where the polynomials are evaluated, besides infinity. Those of F(4×4) lie closer together than the usual ±1 and ±2
# and are as exact in binary: they leave a quarter of the rounding error.
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}


def convolve(
    x: Float[Array, "batch h w inputs"],
    kernel: Float[Array, "3 3 inputs outputs"],
    pads: Sequence[tuple[int, int]],
    side: int = 2,
) -> Float[Array, "batch h2 w2 outputs"]:
    """Returns the convolution of stride 1 by F(side × side, 3 × 3); any size of at least one output works.

    Args:
      x: the images.
      kernel: the weights.
      pads: zeros around the images, ((top, bottom), (left, right)).
      side: 2, whose rounding errors are those of the plain convolution, or 4, whose errors are five times as large.
    """
    output, weights, data = transforms(side)
    height, width = (n + sum(pad) - 2 for n, pad in zip(x.shape[1:3], pads, strict=True))
    rows, columns = -(-height // side), -(-width // side)
    filled = [(pad[0], pad[1] + n * side - m) for pad, n, m in zip(pads, (rows, columns), (height, width), strict=True)]
    x = jnp.pad(x, ((0, 0), *filled, (0, 0)))
    batch, _, _, inputs = x.shape

    strips = [x[:, i : i + (rows - 1) * side + 1 : side] for i in range(side + 2)]
    tiles = [
        value.reshape(-1, inputs)
        for strip in _combine(data, strips)
        for value in _combine(data, [strip[:, :, j : j + (columns - 1) * side + 1 : side] for j in range(side + 2)])
    ]
    taps = [tap for row in _combine(weights, list(kernel)) for tap in _combine(weights, list(row))]
    # Fused into the matrix products, the sums around them would be computed anew for every entry that reads them.
    products = lax.optimization_barrier([a @ b for a, b in zip(*lax.optimization_barrier((tiles, taps)), strict=True)])
    by_row = [products[i * (side + 2) : (i + 1) * (side + 2)] for i in range(side + 2)]
    halves = [_combine(output, column) for column in zip(*by_row, strict=True)]
    lines = [jnp.stack(_combine(output, line), 1) for line in zip(*halves, strict=True)]
    y = jnp.stack([line.reshape(batch, rows, columns * side, -1) for line in lines], 2)
    return y.reshape(batch, rows * side, columns * side, -1)[:, :height, :width]


@functools.cache
def transforms(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns Aᵀ [side, side + 2], G [side + 2, 3] and Bᵀ [side + 2, side + 2] of F(side, 3), in float64.

    They are the transposed Toom-Cook product of polynomials: G evaluates the kernel at `POINTS` and at infinity (its
    leading coefficient) and divides by Π_{l ≠ k} (p_k − p_l); row k of Bᵀ holds the coefficients of
    Π_{l ≠ k} (z − p_l).
    """
    points = np.asarray(POINTS[side])
    others = [np.delete(points, k) for k in range(len(points))]
    scale = np.array([np.prod(p - rest) for p, rest in zip(points, others, strict=True)])
    output = np.column_stack([np.vander(points, side, increasing=True).T, np.eye(side)[-1]])
    weights = np.vstack([np.vander(points, 3, increasing=True) / scale[:, None], np.eye(3)[-1]])
    data = np.zeros((side + 2, side + 2))
    for row, roots in zip(data, [*others, points], strict=True):
        row[: len(roots) + 1] = np.poly(roots)[::-1]
    return output, weights, data


def _combine(matrix: np.ndarray, arrays: Sequence[Array]) -> list[Array]:
    """The product of a small matrix and a column of arrays, without the terms that are zero."""
    sums = []
    for row in matrix.tolist():
        terms = [array if c == 1 else c * array for c, array in zip(row, arrays, strict=True) if c]
        sums.append(functools.reduce(jnp.add, terms))
    return sums


# backbones.convolution: The forms of a convolution: which one runs is chosen here, by platform, and nowhere else.
#
# XLA's CPU backend runs depthwise and 1×1 convolutions through a generic path that is many times slower than
# the same sums written out, wide 3×3 convolutions take fewer multiplications in Winograd's form, and a few images at a
# time stay in the caches; on GPU and TPU the plain forms are quick. All forms give the same numbers, up to rounding.


Padding = str | Sequence[tuple[int, int]]
AXES = ("NHWC", "HWIO", "NHWC")
NO_PADS = ((0, 0), (0, 0))
COLUMN_CHANNELS = 4  # with as few inputs and a stride, the form of XLA takes twice as long
WINOGRAD_CHANNELS = 128  # with fewer in or out, transforming tiles costs what the products save
CHUNK_PIXELS = 2**17  # of the images that a CPU takes through a network together: two at 224 px, eight at 128


def explicit_padding(
    size: Sequence[int], window: Sequence[int], stride: int, padding: Padding
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns ((top, bottom), (left, right)) for "SAME", "VALID" or padding that is already explicit.

    "SAME" is TensorFlow's: ceil(size / stride) outputs, and an odd padding puts the extra row at the end, so
    that a 3×3 kernel with stride 2 pads an even size at its end only. PyTorch's 1 is ((1, 1), (1, 1)).

    Raises:
        ValueError: if `padding` is another word.
    """
    if padding == "VALID":
        return (0, 0), (0, 0)
    if padding == "SAME":
        totals = [max((-(-n // stride) - 1) * stride + k - n, 0) for n, k in zip(size, window, strict=True)]
        return (totals[0] // 2, totals[0] - totals[0] // 2), (totals[1] // 2, totals[1] - totals[1] // 2)
    if isinstance(padding, str):
        raise ValueError(f"padding is {padding!r}: give 'SAME', 'VALID' or ((top, bottom), (left, right)).")
    (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)


def conv(
    x: Float[Array, "batch h w inputs"],
    kernel: Float[Array, "kh kw inputs outputs"],
    bias: Float[Array, "outputs"],
    stride: int = 1,
    padding: Padding = "SAME",
) -> Float[Array, "batch h2 w2 outputs"]:
    """Returns the full convolution plus bias."""
    pads = explicit_padding(x.shape[1:3], kernel.shape[:2], stride, padding)
    plain = functools.partial(conv_plain, stride=stride, pads=pads)
    form = _cpu_form(kernel.shape, stride)
    return _by_platform(lambda x, kernel: form(x, kernel, stride, pads), plain, x, kernel) + bias


def _cpu_form(shape: Sequence[int], stride: int) -> Callable[..., Array]:
    """The form that is quickest on a CPU for a kernel of that shape."""
    if stride > 1 and shape[2] <= COLUMN_CHANNELS:
        return conv_by_columns
    if tuple(shape[:2]) == (3, 3) and stride == 1 and min(shape[2:]) >= WINOGRAD_CHANNELS:
        return conv_by_winograd
    return conv_for_loops


def depthwise(
    x: Float[Array, "batch h w channels"],
    kernel: Float[Array, "kh kw 1 channels"],
    bias: Float[Array, "channels"],
    stride: int = 1,
    padding: Padding = "SAME",
) -> Float[Array, "batch h2 w2 channels"]:
    """Returns the convolution of every channel with its own kernel, plus bias."""
    pads = explicit_padding(x.shape[1:3], kernel.shape[:2], stride, padding)
    shifts = functools.partial(depthwise_by_shifts, stride=stride, pads=pads)
    plain = functools.partial(depthwise_plain, stride=stride, pads=pads)
    return _by_platform(shifts, plain, x, kernel) + bias


def pointwise(
    x: Float[Array, "batch h w inputs"],
    kernel: Float[Array, "1 1 inputs outputs"],
    bias: Float[Array, "outputs"],
) -> Float[Array, "batch h w outputs"]:
    """Returns the 1×1 convolution plus bias."""
    return _by_platform(pointwise_by_product, pointwise_plain, x, kernel) + bias


def max_pool_2x2(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h//2 w//2 channels"]:
    """Returns the largest of every 2×2 square; a last odd row or column is dropped, as in PyTorch."""
    return _by_platform(max_pool_by_slices, max_pool_plain, x)


def max_pool_3x3(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch ceil(h/2) ceil(w/2) channels"]:
    """Returns the largest of every 3×3 square at stride 2, one row and column around the map counting as −∞.

    As `torch.nn.MaxPool2d(3, stride=2, padding=1)`.
    """
    pads = ((1, 1), (1, 1))
    return _by_platform(lambda x: max_pool_by_slices(x, 3, pads), lambda x: max_pool_plain(x, 3, pads), x)


def in_chunks(
    function: Callable[[Float[Array, "images h w channels"]], Float[Array, "images ..."]],
    x: Float[Array, "batch h w channels"],
    most: int | None = None,
) -> Float[Array, "batch ..."]:
    """Returns `function(x)`, which must treat every image by itself, on a CPU a few images at a time.

    The maps of a few images stay in the caches, and the memory for them is asked for once, not once per layer. A chunk
    is the largest divisor of the batch up to `most`, by default up to `CHUNK_PIXELS`.
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


def conv_plain(x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]]) -> Array:
    """Returns the full convolution in XLA's own form."""
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=AXES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_for_loops(x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]]) -> Array:
    """Returns `conv_plain`, whose gradients are convolutions of images [batch, h, w, …] by kernels [kh, kw, …] too.

    Those that JAX derives name the axes in another order. XLA's CPU backend puts them right outside of loops alone;
    inside one it goes pixel by pixel, 30 to 100 times slower.
    """
    return conv_plain(x, kernel, stride, pads)


def _forward(x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]]) -> tuple[Array, tuple]:
    return conv_plain(x, kernel, stride, pads), (x, kernel)


def _backward(
    stride: int, pads: Sequence[tuple[int, int]], kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    """∂/∂x: the gradient, `stride` apart, by the turned kernel; ∂/∂kernel: x by the gradient, each pixel a "sample"."""
    x, kernel = kept
    by = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=AXES)
    sizes, windows = x.shape[1:3], kernel.shape[:2]
    # How far the windows reach, of which the last row or column of an image may be left out.
    reach = [(outputs - 1) * stride + 1 for outputs in gradient.shape[1:3]]
    before = [pad[0] for pad in pads]
    axes = list(zip(sizes, windows, reach, before, strict=True))
    of_x = by(
        gradient,
        kernel[::-1, ::-1].swapaxes(2, 3),
        padding=[(k - 1 - b, n + b - r) for n, k, r, b in axes],
        lhs_dilation=(stride, stride),
    )
    of_kernel = by(
        x.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        padding=[(b, k - 1 + r - n - b) for n, k, r, b in axes],
        rhs_dilation=(stride, stride),
    )
    return of_x, of_kernel.transpose(1, 2, 0, 3)


conv_for_loops.defvjp(_forward, _backward)


def conv_by_winograd(x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]]) -> Array:
    """Returns the full 3×3 convolution of stride 1 by F(2×2), the quicker of the two within a network."""
    del stride
    return convolve(x, kernel, pads)


def conv_by_columns(x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]]) -> Array:
    """Returns the full convolution as one matrix product of the kernel and the pixels under it, copied side by side."""
    kh, kw, inputs, outputs = kernel.shape
    columns = jnp.concatenate([image for row in _shifted(x, (kh, kw), stride, pads) for image in row], -1)
    flat = columns.reshape(-1, kh * kw * inputs) @ kernel.reshape(-1, outputs)
    return flat.reshape(*columns.shape[:3], outputs)


def depthwise_by_shifts(x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]]) -> Array:
    """Returns the depthwise convolution as a sum of shifted images, each times one tap of the kernel."""
    images = _shifted(x, kernel.shape[:2], stride, pads)
    terms = [images[i][j] * kernel[i, j, 0] for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    return functools.reduce(jnp.add, terms)


def _shifted(
    x: Array, window: Sequence[int], stride: int, pads: Sequence[tuple[int, int]], around: float = 0
) -> list[list[Float[Array, "batch h2 w2 channels"]]]:
    """The pixels under each tap of a window, by its row and column; `around` stands where there is none."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=around)
    batch, height, width, channels = x.shape
    kh, kw = window
    last_row, last_column = (height - kh) // stride * stride, (width - kw) // stride * stride

    def under(i: int, j: int) -> Array:
        end = (batch, i + last_row + 1, j + last_column + 1, channels)
        return lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1))

    return [[under(i, j) for j in range(kw)] for i in range(kh)]


def depthwise_plain(x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]]) -> Array:
    """Returns the depthwise convolution in XLA's own form."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=AXES, feature_group_count=x.shape[-1]
    )


def pointwise_by_product(x: Array, kernel: Array) -> Array:
    """Returns the 1×1 convolution as one matrix product."""
    flat = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


def pointwise_plain(x: Array, kernel: Array) -> Array:
    """Returns the 1×1 convolution in XLA's own form."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=AXES)


def max_pool_by_slices(x: Array, window: int = 2, pads: Sequence[tuple[int, int]] = NO_PADS) -> Array:
    """Returns the maximum under a window that goes by two pixels, as that of strided slices."""
    rows = _shifted(x, (window, window), 2, pads, around=-jnp.inf)
    return functools.reduce(jnp.maximum, [image for row in rows for image in row])


def max_pool_plain(x: Array, window: int = 2, pads: Sequence[tuple[int, int]] = NO_PADS) -> Array:
    """Returns the maximum under a window that goes by two pixels, in XLA's own form."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, 2, 2, 1), ((0, 0), *pads, (0, 0)))


def _by_platform(cpu: Callable[..., Array], default: Callable[..., Array], *arguments: Array) -> Array:
    return lax.platform_dependent(*arguments, cpu=cpu, default=default)


class Convolution(nnx.Module):
    """A layer's `kernel` [kh, kw, inputs, outputs] and `bias` [outputs]; the network says how to use them."""

    def __init__(self, rngs: nnx.Rngs, *shape: int):
        """Draws the kernel as He et al. (arXiv 1502.01852) do for ReLUs; the bias is 0."""
        self.kernel = nnx.Param(jax.nn.initializers.he_normal()(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(shape[-1:], jnp.float32))

    @property
    def arrays(self) -> tuple[Array, Array]:
        """The kernel and the bias, in the order that the functions of this file take."""
        return self.kernel[...], self.bias[...]
