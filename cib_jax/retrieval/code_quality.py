"""Quality of codes without labels: use of the bits, and agreement with features or between views."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int64, UInt8

from cib_jax import codes
from cib_jax.errors import UserError
from cib_jax.retrieval.hamming import hamming_distances, rank, validate_packed
from cib_jax.retrieval.metrics import expected_average_precision

# Codes that are unpacked at a time: float32 counts of at most this many are exact (below 2**24).
BLOCK = 1 << 14

SCORES = {
    "separation": "how far an image's nearest codes stand out from all others, in deviations of the distances",
    "neighbour_agreement": "codes find an image's nearest neighbors by the features before hashing",
    "view_agreement": "the code of one view of an image finds that of another view among all images",
    "entropy": "the codes' entropy, in bits: many codes, evenly used",
    "decorrelation": "1 − mean |correlation| of two bits",
    "contrast": "minus the training contrast at the end, in nats",
}
"""Names and descriptions of the scores that need no labels; larger is better for each."""

NEIGHBOURS = 20
"""Default number of neighbors of `neighbour_agreement`."""

SHARE = 0.04
"""Default share of the other images that count as nearest in `separation`."""


# Use of the bits.


def code_health(packed: UInt8[np.ndarray, "n bytes"], bits: int | None = None) -> dict[str, Any]:
    """Returns statistics of the empirical distribution of codes, as plain numbers and lists.

    - `bit_balance`: The share of ones at each bit, bit 0 being the most significant of byte 0; 0.5 is best.
    - `worst_bit_balance`: The entry of `bit_balance` farthest from 0.5.
    - `dead_bits`: The number of bits that never change.
    - `mean_abs_correlation`: The mean of |Pearson correlation| over all pairs of bits that do change, 0 if there is no
      such pair. The correlation with a constant is undefined, so only `dead_bits` counts those.
    - `distinct_codes`: The number of different codes.
    - `entropy`: Shannon entropy of the codes, −Σ p log2 p, at most min(bits, log2 n).
    - `mean_bit_entropy`: The mean over bits of each bit's own entropy, from 0 to 1.

    Args:
      packed: Packed codes.
      bits: Length of a code; None takes all bits of the bytes.

    Raises:
      UserError: `packed` is not packed uint8 codes or is empty.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> health = cib.code_health(np.array([[0b00000000], [0b11110000]], np.uint8))
      >>> health["dead_bits"], health["distinct_codes"], health["mean_abs_correlation"], health["entropy"]
      (4, 2, 1.0, 1.0)
    """
    validate_packed(packed, "packed")
    n = len(packed)
    together = _ones_together(packed, bits)
    balance = np.diag(together) / n
    dead = (balance == 0) | (balance == 1)
    frequencies = _multiplicities(packed) / n
    correlation = _correlation(together[~dead][:, ~dead], n)
    pairs = np.abs(correlation[np.triu_indices(len(correlation), k=1)])
    return {
        "bit_balance": balance.tolist(),
        "worst_bit_balance": float(balance[np.argmax(np.abs(balance - 0.5))]),
        "dead_bits": int(dead.sum()),
        "mean_abs_correlation": float(pairs.mean()) if len(pairs) else 0.0,
        "distinct_codes": len(frequencies),
        "entropy": float(_entropy_terms(frequencies).sum()),
        "mean_bit_entropy": float((_entropy_terms(balance) + _entropy_terms(1 - balance)).mean()),
    }


def bit_correlation(packed: UInt8[np.ndarray, "n bytes"], bits: int | None = None) -> Float64[np.ndarray, "bits bits"]:
    """Returns the Pearson correlation of every two of the `bits` bits; NaN with a bit that never changes."""
    validate_packed(packed, "packed")
    return _correlation(_ones_together(packed, bits), len(packed))


def occupancy(packed: UInt8[np.ndarray, "n bytes"]) -> Int64[np.ndarray, " distinct"]:
    """Returns the number of items that share each distinct code, largest first."""
    validate_packed(packed, "packed")
    return np.sort(_multiplicities(packed))[::-1]


def _ones_together(packed: UInt8[np.ndarray, "n bytes"], bits: int | None) -> Int64[np.ndarray, "bits bits"]:
    """Returns the number of codes with both bits of each pair set; on the diagonal, with that bit set."""
    bits = packed.shape[1] * 8 if bits is None else bits
    together = np.zeros((bits, bits), np.int64)
    for start in range(0, len(packed), BLOCK):
        ones = codes.ones(packed[start : start + BLOCK], bits).astype(np.float32)
        together += (ones.T @ ones).astype(np.int64)
    return together


def _correlation(together: Int64[np.ndarray, "bits bits"], n: int) -> Float64[np.ndarray, "bits bits"]:
    """Returns correlations from integer covariances (times n²), which are exact."""
    ones = np.diag(together)
    deviation = np.sqrt(ones * (n - ones))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (n * together - np.outer(ones, ones)) / np.outer(deviation, deviation)


def _multiplicities(packed: UInt8[np.ndarray, "n bytes"]) -> Int64[np.ndarray, " distinct"]:
    """Returns the number of occurrences of each distinct code."""
    # As one item of raw bytes per code, which sorts faster than `np.unique(axis=0)`.
    rows = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1])))
    return np.unique(rows.ravel(), return_counts=True)[1]


def _entropy_terms(probabilities: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Returns −p log2 p, 0 at p = 0."""
    positive = np.where(probabilities > 0, probabilities, 1.0)
    # abs: at p = 1 the product is −0.0.
    return np.abs(positive * np.log2(positive))


# Scores for the choice among encoders; docs/results.md reports how well they rank runs.


def separation(packed: UInt8[np.ndarray, "n bytes"], *, share: float = SHARE) -> float:
    """Returns (mean distance of all pairs − mean distance to the nearest ones) / standard deviation over all pairs.

    If codes fall into groups, the nearest are much nearer than others are to each other. Codes that are only spread
    widely, or only repeat themselves, gain nothing, since distances are measured in their own standard deviation.

    It is 0 if all codes are the same. `share` is the share of the other images that count as nearest.
    """
    n = len(packed)
    if n < 3:
        raise UserError(f"packed must have at least 3 rows, got {n}; encode more images", field="packed")
    distances = hamming_distances(packed, packed)
    count = max(1, round(share * (n - 1)))
    # An image is at distance 0 from itself, and so among its nearest: one more is taken, which adds 0 to the sum.
    nearest = np.partition(distances, count, axis=1)[:, : count + 1].sum(dtype=np.float64) / (n * count)
    pairs = n * (n - 1)
    mean = distances.sum(dtype=np.float64) / pairs
    variance = np.square(distances, dtype=np.float64).sum() / pairs - mean**2
    return float((mean - nearest) / np.sqrt(variance)) if variance > 1e-12 else 0.0


def neighbour_agreement(
    packed: UInt8[np.ndarray, "n bytes"], features: Float[np.ndarray, "n features"], *, neighbours: int = NEIGHBOURS
) -> float:
    """Returns the tie-aware MAP of codes, with an image's nearest neighbors by its features as the relevant ones.

    Neighbors are by cosine of centered features. Each image is a query among all others.
    """
    n = len(packed)
    if n != len(features) or n <= neighbours + 1:
        raise UserError(
            f"packed and features must have one row for each of more than {neighbours + 1} images, got {n} and "
            f"{len(features)}; take more images",
            field="packed",
        )
    relevant = np.zeros((n, n), bool)
    np.put_along_axis(relevant, _nearest_by_cosine(features, neighbours), True, axis=1)
    counts, hits = _histograms(packed, packed, relevant)
    counts[:, 0] -= 1  # the image itself, at distance 0
    return float(expected_average_precision(counts, hits, n - 1).mean())


def neighbor_recall(
    query_codes: UInt8[np.ndarray, "queries bytes"],
    database_codes: UInt8[np.ndarray, "database bytes"],
    query: Float[np.ndarray, "queries *views features"],
    blocks: Callable[[], Iterable[Float[np.ndarray, "_ *views features"]]],
    ks: Sequence[int],
) -> dict[int, float]:
    """Returns, for each k, the share of a query's k nearest vectors, by cosine, that are among its k nearest codes.

    Codes at one distance are in database order. `blocks` returns the vectors of the database in blocks of rows.
    """
    found, step = rank(query_codes, database_codes, max(ks)), 1024
    parts = [_nearest_in(blocks(), query[start : start + step], max(ks)) for start in range(0, len(query), step)]
    pairs = list(zip(found, np.concatenate(parts), strict=True))
    return {k: float(np.mean([len(np.intersect1d(one[:k], two[:k])) / k for one, two in pairs])) for k in ks}


def _nearest_in(
    blocks: Iterable[Float[np.ndarray, "_ *views features"]],
    query: Float[np.ndarray, "queries *views features"],
    k: int,
) -> Int[np.ndarray, "queries nearest"]:
    """Returns the numbers of each query's k nearest rows by cosine, nearest first."""
    unit, first = _unit(query), 0
    best, places = np.zeros((len(unit), 0), np.float32), np.zeros((len(unit), 0), np.int64)
    for block in blocks:
        numbers = np.arange(first, first + len(block))
        best = np.hstack([best, unit @ _unit(block).T])
        places = np.hstack([places, np.broadcast_to(numbers, (len(unit), len(block)))])
        if best.shape[1] > k:
            keep = np.argpartition(-best, k - 1, axis=1)[:, :k]
            best, places = np.take_along_axis(best, keep, 1), np.take_along_axis(places, keep, 1)
        first += len(block)
    return np.take_along_axis(places, np.argsort(-best, axis=1, kind="stable"), 1)


def _unit(vectors: Float[np.ndarray, "rows *views features"]) -> Float[np.ndarray, "rows features"]:
    vectors = np.asarray(vectors[:, 0] if vectors.ndim == 3 else vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def view_agreement(packed1: UInt8[np.ndarray, "n bytes"], packed2: UInt8[np.ndarray, "n bytes"]) -> float:
    """Returns how well the code of an image's first view finds that of its second view among all second views.

    The mean over images of the expected reciprocal rank, with images at one distance in random order.
    """
    if len(packed1) != len(packed2):
        raise UserError(
            f"packed1 and packed2 must have one row for each image, got {len(packed1)} and {len(packed2)}; pass two "
            "views of each image",
            field="packed2",
        )
    # With one relevant image, average precision is the reciprocal of its rank.
    counts, hits = _histograms(packed1, packed2, np.eye(len(packed1), dtype=bool))
    return float(expected_average_precision(counts, hits, len(packed1)).mean())


def _nearest_by_cosine(features: Float[np.ndarray, "n features"], count: int) -> Int[np.ndarray, "n count"]:
    """Returns each row's `count` nearest other rows by the cosine of centered features."""
    centered = np.asarray(features, np.float32) - np.mean(features, axis=0, dtype=np.float64).astype(np.float32)
    norms = np.linalg.norm(centered, axis=1, keepdims=True)
    return np.asarray(_largest_cosines(jnp.asarray(centered / np.maximum(norms, 1e-12)), count))


@functools.partial(jax.jit, static_argnums=1)
def _largest_cosines(unit: Float[Array, "n features"], count: int) -> Int[Array, "n count"]:
    # Accelerators multiply in bfloat16 or TF32 by default, which would reorder near neighbors.
    cosines = jnp.matmul(unit, unit.T, precision="highest")
    return jax.lax.top_k(jnp.where(jnp.eye(len(unit), dtype=bool), -jnp.inf, cosines), count)[1]


def _histograms(
    queries: UInt8[np.ndarray, "n bytes"], database: UInt8[np.ndarray, "n bytes"], relevant: np.ndarray
) -> tuple[Int64[np.ndarray, "n radii"], Int64[np.ndarray, "n radii"]]:
    """Returns the numbers of all and of relevant images at each distance 0..bits from each query."""
    n, radii = len(queries), 8 * queries.shape[1] + 1
    bins = (np.arange(n)[:, None] * radii + hamming_distances(queries, database)).ravel()
    every, hits = (np.bincount(some, minlength=n * radii).reshape(n, radii) for some in (bins, bins[relevant.ravel()]))
    return every, hits
