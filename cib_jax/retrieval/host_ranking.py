"""Ranks and histograms of a block of rows of distances, on the host: NumPy calls that leave other threads free.

Every call works on the whole block, so that threads meet at the interpreter's lock a few times a block, and none of
them holds the lock while it works, which `np.bincount` would.
"""

import math

import numpy as np
from jaxtyping import Bool, Int64, UInt

# About as many distances bound the k-th smallest well, in a tenth of the time that all of them take.
_SAMPLE = 1 << 12


def nearest(distances: UInt[np.ndarray, "queries n"], size: int, k: int) -> Int64[np.ndarray, "queries k"]:
    """Returns the positions of each row's k smallest distances, ascending, ties in order of position.

    Columns from `size` on are padding: the type's largest value. n is a multiple of 8.

    Only the candidates within a bound are sorted, those of all rows at once. The bounds come from a sample: too
    wide, they cost a longer sort; where one leaves too few, the exact one takes its place.
    """
    rows, width = distances.shape
    bounds = _sampled_bounds(distances[:, :size], k)
    found, starts = _within(distances, bounds)
    short = np.flatnonzero(np.diff(starts) < k)
    if len(short):
        for row in short:
            bounds[row] = kth_distance(distances[row], k)
        found, starts = _within(distances, bounds)
    # Row and distance in one number, of 16 bits where that is possible: NumPy sorts those by counting.
    span = int(bounds.max()) + 1
    dtype = np.min_scalar_type(rows * span - 1)
    keys = np.repeat((np.arange(rows) * span).astype(dtype), np.diff(starts))
    keys += distances.reshape(-1)[found]
    order = np.argsort(keys, kind="stable")
    ranked = found[order[starts[:-1, None] + np.arange(k)]]
    ranked -= np.arange(rows)[:, None] * width
    return ranked


def _sampled_bounds(distances: UInt[np.ndarray, "queries size"], k: int) -> UInt[np.ndarray, " queries"]:
    """Returns distances that at least k of each row are within, nearly always and hardly more than necessary."""
    size = distances.shape[1]
    sample = np.sort(distances[:, :: max(1, size // _SAMPLE)], axis=1, kind="stable")
    expected = k * sample.shape[1] / size
    return sample[:, min(sample.shape[1], math.ceil(expected + 3 * math.sqrt(expected))) - 1].copy()


def _within(
    distances: UInt[np.ndarray, "queries n"], bounds: UInt[np.ndarray, " queries"]
) -> tuple[Int64[np.ndarray, " found"], Int64[np.ndarray, " queries+1"]]:
    """Returns the flat positions of distances within their row's bound, and where each row's begin."""
    found = true_positions(distances <= bounds[:, None])
    return found, np.searchsorted(found, np.arange(len(distances) + 1) * distances.shape[1])


def true_positions(mask: Bool[np.ndarray, "queries n"]) -> Int64[np.ndarray, " found"]:
    """Returns where a mask is true when flattened, ascending; its size is a multiple of 8.

    In two steps, eight at a time and then each: `np.flatnonzero` guesses at every rare true one where the next will
    be, and processors guess wrong.
    """
    words = mask.reshape(-1).view(np.uint64)
    occupied = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[occupied].view(np.bool_))
    found = (occupied << 3)[inside >> 3]
    found += inside & 7
    return found


def kth_distance(distances: UInt[np.ndarray, " n"], k: int) -> int:
    """Returns the k-th smallest distance, by bisection on how many distances lie at or below a value."""
    low, high = 0, int(distances.max())
    while low < high:
        middle = (low + high) // 2
        if np.count_nonzero(distances <= middle) >= k:
            high = middle
        else:
            low = middle + 1
    return low


def histograms(
    distances: UInt[np.ndarray, "queries size"], relevance: Bool[np.ndarray, "queries size"], radii: int
) -> Int64[np.ndarray, "queries 2 radii"]:
    """Returns how many irrelevant, and how many relevant images lie at each distance 0..radii−1 from each query.

    Both from one sort of small integers: irrelevant images in the lower half of the bins, relevant ones above.
    """
    dtype = np.min_scalar_type(2 * radii - 1)
    bins = np.multiply(relevance.view(np.uint8), radii, dtype=dtype)
    bins += distances
    bins.sort(axis=1, kind="stable")
    ends = np.stack([np.searchsorted(row, np.arange(2 * radii, dtype=dtype), "right") for row in bins])
    return np.diff(ends, axis=1, prepend=0).reshape(len(bins), 2, radii)
