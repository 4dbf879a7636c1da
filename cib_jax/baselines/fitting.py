"""What every baseline takes and gives, and how what it takes is checked."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

Encoder = Callable[[Float[Array, "batch features"]], Float[Array, "batch bits"]]
"""Features → logits, a pytree: it passes through `jax.jit` as an argument."""

Fit = Callable[[Float[np.ndarray, "n features"], int, PRNGKeyArray], Encoder]
"""(features of the training images, bits, key) → encoder."""


def check(features: Float[np.ndarray, "n features"], bits: int, *, most: int | None = None, why: str = "") -> None:
    """Raises a ValueError unless a baseline can learn `bits` bits from `features`.

    Args:
      features: of the training images.
      bits: the length of a code.
      most: the longest code that the method can give; None: any.
      why: in words, what limits it.
    """
    if np.ndim(features) != 2 or 0 in np.shape(features) or len(features) < 2:
        raise ValueError(f"features: wanted [n, features] with 2 rows or more, got {list(np.shape(features))}")
    if not np.isfinite(features).all():
        raise ValueError("features: they hold values that are not finite; remove those rows")
    if bits < 1:
        raise ValueError(f"bits: {bits} must be 1 or more")
    if most is not None and bits > most:
        raise ValueError(f"bits: {bits} is more than {most}, {why}; choose shorter codes or another method")


def generator(key: PRNGKeyArray) -> np.random.Generator:
    """Returns NumPy's generator of a JAX key, for what is drawn on the host."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
