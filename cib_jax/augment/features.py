"""Features that stand for images: standardised, and two views of each, by noise or as they were stored."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis

FAMILIES = ("noise", "stored")
"""noise: a vector per item, its views by noise and dropout; stored: several vectors per item, two of them drawn."""


class Standard(NamedTuple):
    """What takes features to mean 0 and deviation 1, each by itself."""

    mean: Float32[np.ndarray, " features"]
    deviation: Float32[np.ndarray, " features"]

    def to_lists(self) -> dict[str, list[float]]:
        """Returns the numbers as JSON can hold them, exactly."""
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    @classmethod
    def from_lists(cls, lists: dict[str, list[float]]) -> "Standard":
        """Returns what `to_lists` was given."""
        return cls(np.array(lists["mean"], np.float32), np.array(lists["deviation"], np.float32))


def standard(blocks: Iterable[Float[np.ndarray, "rows *views features"]]) -> Standard:
    """Returns mean and deviation of each feature over all rows, and views, of blocks read one after the other.

    Sums are of differences from a running mean, in float64 (Chan, Golub and LeVeque 1983), so that a large mean costs
    no precision. Features that never change get deviation 1.

    Raises:
      ValueError: there is no row.
    """
    count, mean, squares = 0, np.zeros(0), np.zeros(0)
    for block in blocks:
        rows = np.asarray(block, np.float64).reshape(-1, block.shape[-1])
        if not len(rows):
            continue
        of_block = rows.mean(axis=0)
        spread = np.square(rows - of_block).sum(axis=0)
        if not count:
            count, mean, squares = len(rows), of_block, spread
            continue
        whole = count + len(rows)
        apart = of_block - mean
        squares += spread + np.square(apart) * (count * len(rows) / whole)
        mean = mean + apart * (len(rows) / whole)
        count = whole
    if not count:
        raise ValueError("blocks: there is no row; give at least one")
    deviation = np.sqrt(squares / count)
    # Below this, what looks like a spread is the rounding of float32.
    constant = deviation <= 1e-6 * np.abs(mean)
    return Standard(mean.astype(np.float32), np.where(constant, 1, deviation).astype(np.float32))


def plain(
    features: Float[Array, "batch *views features"],
    mean: Sequence[float],
    deviation: Sequence[float],
) -> Float32[Array, "batch features"]:
    """Returns standardised features as at test time: of stored views, the first."""
    return _standardised(features[:, 0] if features.ndim == 3 else features, mean, deviation)


def two_views(
    key: PRNGKeyArray,
    features: Float[Array, "batch *views features"],
    mean: Sequence[float],
    deviation: Sequence[float],
    *,
    family: str,
    noise: float,
    dropout: float,
    axis: Axis = None,
) -> tuple[Float32[Array, "batch features"], Float32[Array, "batch features"]]:
    """Returns two views of each item, standardised.

    Args:
      key: decides them.
      features: a vector per item; with the family "stored", two or more.
      mean: of each feature.
      deviation: of each feature.
      family: one of `FAMILIES`.
      noise: with "noise", the deviation of what is added to each standardised feature.
      dropout: with "noise", the probability with which a feature is set to its mean; the others are scaled by
        1 / (1 − dropout), so that a view is the item on average.
      axis: see `spread`.

    Raises:
      ValueError: the family is unknown, or does not go with the shape.
    """
    if family not in FAMILIES:
        raise ValueError(f"augment is {family!r}, which makes no views of features; choose {' or '.join(FAMILIES)}.")
    if family == "stored":
        if features.ndim != 3 or features.shape[1] < 2:
            raise ValueError(
                f"features are {list(features.shape)}, but augment='stored' needs [batch, views, features] with two or "
                "more views; store more, or choose augment='noise'."
            )
        return _two_stored(key, features, mean, deviation, axis)
    vectors = plain(features, mean, deviation)
    one, other = jax.random.split(key)
    return _noisy(one, vectors, noise, dropout, axis), _noisy(other, vectors, noise, dropout, axis)


def _standardised(features: Array, mean: Sequence[float], deviation: Sequence[float]) -> Array:
    return (features.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)) / jnp.asarray(deviation, jnp.float32)


def _noisy(key: PRNGKeyArray, vectors: Array, noise: float, dropout: float, axis: Axis) -> Array:
    noise_key, dropout_key = jax.random.split(key)
    if noise:
        vectors = vectors + noise * sharding.draw_sharded(
            lambda shape: jax.random.normal(noise_key, shape), vectors.shape, axis
        )
    if dropout:
        kept = sharding.draw_sharded(
            lambda shape: jax.random.bernoulli(dropout_key, 1 - dropout, shape), vectors.shape, axis
        )
        vectors = vectors * kept / (1 - dropout)
    return vectors


def _two_stored(
    key: PRNGKeyArray, features: Array, mean: Sequence[float], deviation: Sequence[float], axis: Axis
) -> tuple[Array, Array]:
    batch, views = features.shape[:2]
    one, other = jax.random.split(key)
    first = sharding.draw_sharded(lambda shape: jax.random.randint(one, shape, 0, views), (batch,), axis)
    second = (
        first + sharding.draw_sharded(lambda shape: jax.random.randint(other, shape, 1, views), (batch,), axis)
    ) % views
    rows = jnp.arange(batch)
    return (
        _standardised(features[rows, first], mean, deviation),
        _standardised(features[rows, second], mean, deviation),
    )
