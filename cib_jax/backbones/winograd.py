"""3×3 convolutions with fewer multiplications: Winograd's F(m×m, 3×3) after Lavin & Gray (arXiv 1509.09308).

An image is cut into tiles of (m + 2)² pixels that overlap by two; each gives m² outputs. Tiles and kernel are
transformed, Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A, so that the sum over channels becomes (m + 2)² matrix products: 16
multiplications instead of 36 for the four outputs of F(2×2), 36 instead of 144 for the sixteen of F(4×4).
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

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
