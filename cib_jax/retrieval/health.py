"""Whether a set of codes uses its bits: balance, correlation and entropy, from packed codes alone."""

from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from cib_jax import binary
from cib_jax.retrieval.ranking import check_packed

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
    check_packed(packed, "packed")
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
    check_packed(packed, "packed")
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
    check_packed(packed, "packed")
    return np.sort(_multiplicities(packed))[::-1]


def _ones_together(packed: UInt8[np.ndarray, "n bytes"]) -> Int64[np.ndarray, "bits bits"]:
    """Returns how many codes have both bits of each pair set; on the diagonal, how many have a bit set."""
    bits = packed.shape[1] * 8
    together = np.zeros((bits, bits), np.int64)
    for start in range(0, len(packed), _BLOCK):
        ones = binary.ones(packed[start : start + _BLOCK]).astype(np.float32)
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
