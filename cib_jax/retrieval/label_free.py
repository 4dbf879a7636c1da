"""How good codes are, as far as can be told without labels. Every score is better when it is larger."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cib_jax.retrieval import ranking
from cib_jax.retrieval.tie_aware import expected_average_precision

SCORES = {
    "separation": "how far an image's nearest codes stand out from all others, in deviations of the distances",
    "neighbour_agreement": "codes find an image's nearest neighbours by the features before hashing",
    "view_agreement": "the code of one view of an image finds that of another view among all images",
    "entropy": "the codes' entropy, in bits: many codes, evenly used",
    "decorrelation": "1 − mean |correlation| of two bits",
    "contrast": "minus the training contrast at the end, in nats",
}
"""What can be scored, in words."""

NEIGHBOURS = 20

SHARE = 0.04
"""Of the other images, those that count as nearest for `separation`."""


def separation(packed: UInt8[np.ndarray, "n bytes"], *, share: float = SHARE) -> float:
    """Returns (mean distance of all pairs − mean distance to the nearest ones) / standard deviation over all pairs.

    It looks at codes alone. Where they fall into groups, the nearest are much nearer than others are to each other;
    codes that only spread, or only repeat themselves, gain nothing, as distances are measured by their own deviation.
    Nearest are the `share` of the other images at the least distance. 0 where all codes are the same. docs/results.md
    says how it orders runs.

    Raises:
      ValueError: codes are malformed, or there are fewer than 3.
    """
    n = len(packed)
    if n < 3:
        raise ValueError(f"packed has {n} rows, but at least 3 images are wanted; take more")
    distances = ranking.hamming_distances(packed, packed)
    count = max(1, round(share * (n - 1)))
    # Each is at distance 0 of itself, and so among its own nearest: one more is taken, which adds nothing to the sum.
    nearest = np.partition(distances, count, axis=1)[:, : count + 1].sum(dtype=np.float64) / (n * count)
    pairs = n * (n - 1)
    mean = distances.sum(dtype=np.float64) / pairs
    variance = np.square(distances, dtype=np.float64).sum() / pairs - mean**2
    return float((mean - nearest) / np.sqrt(variance)) if variance > 1e-12 else 0.0


def neighbour_agreement(
    packed: UInt8[np.ndarray, "n bytes"], features: Float[np.ndarray, "n features"], *, neighbours: int = NEIGHBOURS
) -> float:
    """Returns the MAP of codes where relevant means: among the `neighbours` nearest by cosine of centred features.

    Each image asks among all others; images at one distance count as in random order. From 0 to 1.

    Raises:
      ValueError: codes are malformed, or there are no more than `neighbours` others.
    """
    n = len(packed)
    if n != len(features) or n <= neighbours + 1:
        raise ValueError(
            f"packed and features have {n} and {len(features)} rows, but one for each of more than {neighbours + 1} "
            "images is wanted; take more images"
        )
    relevant = np.zeros((n, n), bool)
    np.put_along_axis(relevant, nearest_by_cosine(features, neighbours), True, axis=1)
    return _among_the_others(ranking.hamming_distances(packed, packed), relevant, packed.shape[1] * 8)


def view_agreement(packed1: UInt8[np.ndarray, "n bytes"], packed2: UInt8[np.ndarray, "n bytes"]) -> float:
    """Returns how well the code of an image's first view finds that of its second among all second views.

    The mean over images of the expected reciprocal rank, images at one distance counting as in random order. From 0 to
    1.

    Raises:
      ValueError: codes are malformed, or not as many of one as of the other.
    """
    if len(packed1) != len(packed2):
        raise ValueError(
            f"packed1 and packed2 have {len(packed1)} and {len(packed2)} rows; give two views of each image"
        )
    distances = ranking.hamming_distances(packed1, packed2)
    counts, hits = _histograms(distances, np.eye(len(packed1), dtype=bool), packed1.shape[1] * 8)
    # With one relevant image, average precision is the reciprocal of its rank.
    return float(expected_average_precision(counts, hits, len(packed1)).mean())


def nearest_by_cosine(features: Float[np.ndarray, "n features"], count: int) -> Int[np.ndarray, "n count"]:
    """Returns each row's `count` nearest other rows by the cosine of centred features."""
    centred = np.asarray(features, np.float32) - np.mean(features, axis=0, dtype=np.float64).astype(np.float32)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(_nearest(jnp.asarray(centred / np.maximum(norms, 1e-12)), count))


@functools.partial(jax.jit, static_argnums=1)
def _nearest(unit: Float[Array, "n features"], count: int) -> Int[Array, "n count"]:
    cosines = jnp.matmul(unit, unit.T, precision="highest")
    return jax.lax.top_k(jnp.where(jnp.eye(len(unit), dtype=bool), -jnp.inf, cosines), count)[1]


def _among_the_others(distances: np.ndarray, relevant: np.ndarray, bits: int) -> float:
    """Returns the expected MAP where no image finds itself."""
    counts, hits = _histograms(distances, relevant, bits)
    counts[:, 0] -= 1  # each is at distance 0 of itself, and not among its own neighbours
    return float(expected_average_precision(counts, hits, len(distances) - 1).mean())


def _histograms(distances: np.ndarray, relevant: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(len(distances))[:, None] * (bits + 1)
    size = len(distances) * (bits + 1)
    places = (rows + distances).ravel()
    counts = np.bincount(places, minlength=size).reshape(-1, bits + 1)
    return counts, np.bincount(places[relevant.ravel()], minlength=size).reshape(-1, bits + 1)
