"""Features in place of images: standardization, and two views of each item, by noise or from stored views."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from cib_jax.augment.augment import two_view_keys
from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis
from cib_jax.errors import UserError

FAMILIES: dict[str, Callable[[PRNGKeyArray, Array], Array] | None] = {"noise": None, "stored": None}
"""noise: one vector per item, views by noise and dropout; stored: several vectors per item, of which two are drawn.
Others are functions (key, standardized vector) → view."""

Features = Float[Array | np.ndarray, "batch *views features"]


class Standard(NamedTuple):
    """Mean and deviation of each feature, by which features are standardized to mean 0 and deviation 1."""

    mean: Float32[np.ndarray, " features"]
    deviation: Float32[np.ndarray, " features"]

    def to_lists(self) -> dict[str, list[float]]:
        """Returns the numbers in a form that JSON can represent exactly."""
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    @classmethod
    def from_lists(cls, lists: dict[str, list[float]]) -> "Standard":
        """Returns the inverse of `to_lists`."""
        return cls(np.array(lists["mean"], np.float32), np.array(lists["deviation"], np.float32))


def standard(blocks: Iterable[Float[Array | np.ndarray, "... features"]]) -> Standard:
    """Returns mean and deviation of each feature over all rows and views of blocks, which are read one by one.

    Sums are taken of differences from a running mean, in float64 (Chan, Golub and LeVeque 1983), so that a large mean
    costs no precision. Constant features get deviation 1.

    Raises:
      ValueError: The blocks have no row.
    """
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for block in blocks:
        rows = np.asarray(block, np.float64).reshape(-1, block.shape[-1])
        if not len(rows):
            continue
        block_mean, total = rows.mean(axis=0), count + len(rows)
        difference = block_mean - mean
        block_squares = np.square(rows - block_mean).sum(axis=0)
        squares = squares + (block_squares + np.square(difference) * (count * len(rows) / total))
        mean = mean + difference * (len(rows) / total)
        count = total
    if not count:
        raise UserError("blocks must have at least one row of features, got none", field="blocks")
    deviation = np.sqrt(squares / count)
    # Below this, the apparent deviation is the rounding of float32.
    constant = deviation <= 1e-6 * np.abs(mean)
    return Standard(mean.astype(np.float32), np.where(constant, 1, deviation).astype(np.float32))


def plain(
    features: Features, mean: Sequence[float] | np.ndarray, deviation: Sequence[float] | np.ndarray
) -> Float32[Array, "batch features"]:
    """Returns standardized features as at test time: of stored views, the first."""
    return _standardize(features[:, 0] if features.ndim == 3 else features, mean, deviation)


def two_views(
    key: PRNGKeyArray,
    features: Features,
    mean: Sequence[float],
    deviation: Sequence[float],
    *,
    family: str,
    noise: float,
    dropout: float,
    axis: Axis = None,
) -> tuple[Float32[Array, "batch features"], Float32[Array, "batch features"]]:
    """Returns two standardized views of each item.

    For the family "noise", `noise` is the standard deviation of Gaussian noise on each standardized feature, and
    `dropout` the probability with which a feature is set to its mean. The others are then scaled by 1 / (1 − dropout),
    so that the expectation of a view is the item.
    """
    if family not in FAMILIES:
        raise UserError(f"family must be one of {', '.join(FAMILIES)} for features, got {family!r}", field="family")
    if family == "stored":
        if features.ndim != 3 or features.shape[1] < 2:
            raise UserError(
                "features must be [batch, views, features] with two or more views for the family 'stored', got "
                f"{list(features.shape)}; store more views, or choose the family 'noise'",
                field="features",
            )
        rows = jnp.arange(features.shape[0])
        one, other = (
            features[rows, views] for views in sharding.draw_two(key, features.shape[0], features.shape[1], axis)
        )
        return _standardize(one, mean, deviation), _standardize(other, mean, deviation)
    vectors = plain(features, mean, deviation)
    if (view := FAMILIES[family]) is not None:
        one_keys, other_keys = two_view_keys(key, len(vectors), axis)
        return jax.vmap(view)(one_keys, vectors), jax.vmap(view)(other_keys, vectors)
    one_key, other_key = jax.random.split(key)
    return _add_noise(one_key, vectors, noise, dropout, axis), _add_noise(other_key, vectors, noise, dropout, axis)


def _standardize(
    features: Array | np.ndarray, mean: Sequence[float] | np.ndarray, deviation: Sequence[float] | np.ndarray
) -> Array:
    center, unit = jnp.asarray(mean, jnp.float32)[None], jnp.asarray(deviation, jnp.float32)[None]
    return (jnp.asarray(features, jnp.float32) - center) / unit


def _add_noise(key: PRNGKeyArray, vectors: Array, noise: float, dropout: float, axis: Axis) -> Array:
    noise_key, dropout_key = jax.random.split(key)
    if noise:
        draw = functools.partial(jax.random.normal, noise_key, dtype=jnp.float32)
        vectors = vectors + noise * sharding.draw_sharded(draw, vectors.shape, axis)
    if dropout:
        kept = sharding.draw_sharded(
            lambda shape: jax.random.bernoulli(dropout_key, 1 - dropout, shape), vectors.shape, axis
        )
        vectors = jnp.where(kept, vectors / (1 - dropout), 0.0)
    return vectors
