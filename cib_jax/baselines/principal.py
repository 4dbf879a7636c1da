"""The directions of greatest variance, in float64 on the host, a block of rows at a time."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

BLOCK = 8192

MOST = 16_384
"""The side of the largest matrix that is decomposed: 2 GiB."""


class Principal(NamedTuple):
    """Principal axes of features, the greatest first."""

    mean: Float64[np.ndarray, " features"]
    axes: Float64[np.ndarray, "features axes"]
    variance: Float64[np.ndarray, " axes"]

    def project(self, features: Float[np.ndarray, "n features"]) -> Float64[np.ndarray, "n axes"]:
        """Returns the coordinates of features along the axes."""
        blocks = [features[start : start + BLOCK] - self.mean for start in range(0, len(features), BLOCK)]
        return np.concatenate([block @ self.axes for block in blocks])


def axes(features: Float[np.ndarray, "n features"], count: int) -> Principal:
    """Returns the first `count` principal axes; of each, the largest component is positive.

    Raises:
      ValueError: features and items are both more than `MOST`.
    """
    mean = np.asarray(np.mean(features, axis=0, dtype=np.float64))
    n, wide = features.shape
    if min(n, wide) > MOST:
        raise ValueError(
            f"features: {wide} features of {n} items are too many for principal axes; take fewer training images, or a "
            "network with fewer features"
        )
    if wide <= n:
        scatter = np.zeros((wide, wide))
        for start in range(0, n, BLOCK):
            centred = features[start : start + BLOCK] - mean
            scatter += centred.T @ centred
        values, vectors = np.linalg.eigh(scatter / n)
        values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    else:
        # As the eigenvectors of the smaller matrix of products of items, led back to features.
        centred = features - mean
        values, items = np.linalg.eigh(centred @ centred.T / n)
        values, items = values[::-1][:count], items[:, ::-1][:, :count]
        # Orthonormal also where no variance is left to decide an axis.
        vectors = np.linalg.qr(centred.T @ items)[0]
        vectors = np.pad(vectors, ((0, 0), (0, count - vectors.shape[1])))
        values = np.pad(values, (0, count - len(values)))
    largest = vectors[np.argmax(np.abs(vectors), axis=0), np.arange(vectors.shape[1])]
    return Principal(mean, vectors * np.where(largest < 0, -1.0, 1.0), np.maximum(values, 0))
