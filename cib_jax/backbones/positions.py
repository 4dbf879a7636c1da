"""Position embeddings learned on one grid of patches, brought to another as PyTorch's bicubic interpolation does it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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
    centres = (np.arange(outputs) + 0.5) * ratio - 0.5
    wide = max(ratio, 1.0) if antialias else 1.0
    beyond = 2  # how far the cubic reaches over the border
    distances = np.abs(np.arange(-beyond, inputs + beyond) - centres[:, None]) / wide
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
