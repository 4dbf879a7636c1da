"""The directions of greatest variance, in float64 on the host, a block of rows at a time."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

BLOCK = 8192


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
    """Returns the first `count` principal axes; of each, the largest component is positive."""
    mean = np.asarray(np.mean(features, axis=0, dtype=np.float64))
    scatter = np.zeros((features.shape[1],) * 2)
    for start in range(0, len(features), BLOCK):
        centred = features[start : start + BLOCK] - mean
        scatter += centred.T @ centred
    values, vectors = np.linalg.eigh(scatter / len(features))
    vectors = vectors[:, ::-1][:, :count]
    largest = vectors[np.argmax(np.abs(vectors), axis=0), np.arange(vectors.shape[1])]
    return Principal(mean, vectors * np.where(largest < 0, -1.0, 1.0), np.maximum(values[::-1][:count], 0))
