"""Spherical hashing: a bit says whether a point lies within a sphere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, PRNGKeyArray

from cib_jax.baselines import fitting

SAMPLE = 10_000
"""Points, at most, that the spheres are fitted on."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spheres:
    """A sphere per bit."""

    mean: Float[Array, " features"]
    """Taken off features and pivots alike: distances of points far from the origin would lose digits."""
    pivots: Float[Array, "bits features"]
    squared_radii: Float[Array, " bits"]

    def __call__(self, features: Float[Array, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns squared radius minus squared distance: positive within a sphere."""
        centred = features - self.mean
        product = jnp.matmul(centred, self.pivots.T, precision="highest")
        squares = jnp.sum(jnp.square(centred), axis=1, keepdims=True)
        return self.squared_radii - (squares - 2 * product + jnp.sum(jnp.square(self.pivots), axis=1))


def fit(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    mean_tolerance: float = 0.1,
    deviation_tolerance: float = 0.15,
    iterations: int = 300,
) -> Spheres:
    """Returns spheres that each hold half of the points and that overlap, two by two, in a quarter of them.

    Heo et al., Spherical hashing, CVPR 2012, algorithm 1: pivots start as random points; those that share more than a
    quarter push each other apart, those that share less pull, until the mean deviation of the overlaps from a quarter
    is below `mean_tolerance` of it and their standard deviation below `deviation_tolerance` of it. Codes are ranked by
    Hamming distance here, as all others, not by the paper's spherical one.

    Raises:
      ValueError: features or bits are malformed, or there are fewer rows than bits.
    """
    fitting.check(features, bits, most=len(features), why="the number of training items: each sphere starts at one")
    draws = fitting.generator(key)
    mean = np.mean(features, axis=0, dtype=np.float64)
    some = draws.choice(len(features), min(SAMPLE, len(features)), replace=False)
    points = np.asarray(features[some], np.float32) - mean.astype(np.float32)
    pivots = points[draws.choice(len(points), bits, replace=False)].astype(np.float64)
    quarter = len(points) / 4
    for _ in range(iterations):
        inside = (distances := _squared_distances(points, pivots)) < _halving(distances)
        overlap = inside.T.astype(np.float32) @ inside.astype(np.float32)
        of_pairs = overlap[np.triu_indices(bits, 1)]
        if bits == 1 or (
            np.abs(of_pairs - quarter).mean() <= mean_tolerance * quarter
            and of_pairs.std() <= deviation_tolerance * quarter
        ):
            break
        pull = (overlap - quarter) / quarter / 2
        np.fill_diagonal(pull, 0)
        # Σ_j ½ (o_ij − m/4) / (m/4) · (p_i − p_j), over the number of spheres.
        pivots = pivots + (pull.sum(axis=1)[:, None] * pivots - pull @ pivots) / bits
    radii = _halving(_squared_distances(points, pivots))
    return Spheres(jnp.asarray(mean, jnp.float32), jnp.asarray(pivots, jnp.float32), jnp.asarray(radii, jnp.float32))


def _squared_distances(
    points: Float[np.ndarray, "n features"], pivots: Float64[np.ndarray, "bits features"]
) -> Float[np.ndarray, "n bits"]:
    centres = pivots.astype(np.float32)
    squares = np.square(points).sum(axis=1, keepdims=True) + np.square(centres).sum(axis=1)
    return squares - 2 * points @ centres.T


def _halving(distances: Float[np.ndarray, "n bits"]) -> Float[np.ndarray, " bits"]:
    """Returns the squared radius of each sphere that holds half of the points."""
    return np.median(distances, axis=0)
