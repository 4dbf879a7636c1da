"""Whether a set of codes uses its bits: balance, correlation and entropy, from packed codes alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int64, UInt8

from cib_jax import codes
from cib_jax.retrieval import hamming
from cib_jax.retrieval.hamming import validate_packed
from cib_jax.retrieval.metrics import expected_average_precision

# retrieval.health: Whether a set of codes uses its bits: balance, correlation and entropy, from packed codes alone.


# Codes unpacked at a time: their float32 co-occurrence counts, at most this many, are exact (below 2**24).
_BLOCK = 1 << 14


def code_health(packed: UInt8[np.ndarray, "n bytes"]) -> dict[str, Any]:
    """Returns statistics of the empirical distribution of codes, as plain numbers and lists.

    - `bit_balance`: the share of ones at each bit, bit 0 being the most significant of byte 0; 0.5 is best.
    - `worst_bit_balance`: the entry of it farthest from 0.5.
    - `dead_bits`: how many bits never change.
    - `mean_abs_correlation`: the mean of |Pearson correlation| over all pairs of bits that do change, 0 when
      there is no such pair. The correlation with a constant is undefined, so `dead_bits` alone counts those.
    - `distinct_codes`: how many different codes occur.
    - `entropy`: Shannon entropy of the codes in bits, at most min(bits, log2 n).
    - `mean_bit_entropy`: the mean over bits of each bit's own entropy, in bits, from 0 to 1.

    Raises:
      ValueError: if `packed` is not packed uint8 codes or is empty.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> health = cib.code_health(np.array([[0b00000000], [0b11110000]], np.uint8))
      >>> health["dead_bits"], health["distinct_codes"], health["mean_abs_correlation"], health["entropy"]
      (4, 2, 1.0, 1.0)
    """
    validate_packed(packed, "packed")
    n = len(packed)
    together = _ones_together(packed)
    ones = np.diag(together)
    balance = ones / n
    frequencies = _multiplicities(packed) / n
    bit_entropy = _entropy_terms(balance) + _entropy_terms(1 - balance)
    return {
        "bit_balance": balance.tolist(),
        "worst_bit_balance": float(balance[np.argmax(np.abs(balance - 0.5))]),
        "dead_bits": int(np.sum((ones == 0) | (ones == n))),
        "mean_abs_correlation": _mean_abs_correlation(together, n),
        "distinct_codes": len(frequencies),
        "entropy": float(_entropy_terms(frequencies).sum()),
        "mean_bit_entropy": float(bit_entropy.mean()),
    }


def bit_correlation(packed: UInt8[np.ndarray, "n bytes"]) -> Float64[np.ndarray, "bits bits"]:
    """Returns the Pearson correlation of every two bits; NaN with a bit that never changes.

    Raises:
      ValueError: if `packed` is not packed uint8 codes or is empty.
    """
    validate_packed(packed, "packed")
    together, n = _ones_together(packed), len(packed)
    ones = np.diag(together)
    deviation = np.sqrt(ones * (n - ones))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (n * together - np.outer(ones, ones)) / np.outer(deviation, deviation)


def occupancy(packed: UInt8[np.ndarray, "n bytes"]) -> Int64[np.ndarray, " distinct"]:
    """Returns how many items share each distinct code, the fullest code first.

    Raises:
      ValueError: if `packed` is not packed uint8 codes or is empty.
    """
    validate_packed(packed, "packed")
    return np.sort(_multiplicities(packed))[::-1]


def _ones_together(packed: UInt8[np.ndarray, "n bytes"]) -> Int64[np.ndarray, "bits bits"]:
    """Returns how many codes have both bits of each pair set; on the diagonal, how many have a bit set."""
    bits = packed.shape[1] * 8
    together = np.zeros((bits, bits), np.int64)
    for start in range(0, len(packed), _BLOCK):
        ones = codes.ones(packed[start : start + _BLOCK]).astype(np.float32)
        together += (ones.T @ ones).astype(np.int64)
    return together


def _mean_abs_correlation(together: Int64[np.ndarray, "bits bits"], n: int) -> float:
    """Returns the mean |correlation| of pairs of live bits, from exact integer covariances (× n²)."""
    ones = np.diag(together)
    live = (ones > 0) & (ones < n)
    if live.sum() < 2:
        return 0.0
    covariance = (n * together - np.outer(ones, ones))[np.ix_(live, live)]
    deviation = np.sqrt(np.diag(covariance))
    correlation = np.abs(covariance) / np.outer(deviation, deviation)
    return float(correlation[np.triu_indices(len(correlation), k=1)].mean())


def _multiplicities(packed: UInt8[np.ndarray, "n bytes"]) -> Int64[np.ndarray, " distinct"]:
    """Returns how often each distinct code occurs; a row of bytes is compared as one item."""
    rows = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1])))
    return np.unique(rows.ravel(), return_counts=True)[1]


def _entropy_terms(probabilities: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Returns −p log2 p, 0 at p = 0."""
    positive = np.where(probabilities > 0, probabilities, 1.0)
    # abs: at p = 1 the product is −0.0.
    return np.abs(positive * np.log2(positive))


# retrieval.label_free: How good codes are, as far as can be told without labels. Every score is better when it is larger.


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
    distances = hamming.hamming_distances(packed, packed)
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
    """Returns the MAP of codes where relevant means: among the `neighbours` nearest by cosine of centered features.

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
    return _among_the_others(hamming.hamming_distances(packed, packed), relevant, packed.shape[1] * 8)


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
    distances = hamming.hamming_distances(packed1, packed2)
    counts, hits = _histograms(distances, np.eye(len(packed1), dtype=bool), packed1.shape[1] * 8)
    # With one relevant image, average precision is the reciprocal of its rank.
    return float(expected_average_precision(counts, hits, len(packed1)).mean())


def nearest_by_cosine(features: Float[np.ndarray, "n features"], count: int) -> Int[np.ndarray, "n count"]:
    """Returns each row's `count` nearest other rows by the cosine of centered features."""
    centered = np.asarray(features, np.float32) - np.mean(features, axis=0, dtype=np.float64).astype(np.float32)
    norms = np.linalg.norm(centered, axis=1, keepdims=True)
    return np.asarray(_nearest(jnp.asarray(centered / np.maximum(norms, 1e-12)), count))


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
