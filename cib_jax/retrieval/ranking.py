"""Exact Hamming ranking of packed codes on the host, ties in database order."""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int32, Shaped, UInt8, UInt16

# 32,768 eight-byte words and their XOR fit a core's second-level cache, and a step still outweighs its call.
_CHUNK = 1 << 15
# About as many distances bound the k-th smallest well, in a tenth of the time that all of them take.
_SAMPLE = 1 << 12
# Distances are uint16: one more byte per code could exceed 65,535 bits.
_MOST_BYTES = np.iinfo(np.uint16).max // 8


def hamming_distances(
    queries: UInt8[np.ndarray, "queries bytes"], database: UInt8[np.ndarray, "database bytes"]
) -> UInt16[np.ndarray, "queries database"]:
    """Returns the number of differing bits between every query and every database code.

    The whole matrix is held, two bytes an entry; `distance_rows` gives it one query at a time.

    Raises:
      ValueError: if the codes are not packed uint8, are empty, or differ in width.
    """
    check_codes(queries, database)
    distances = np.empty((len(queries), len(database)), np.uint16)
    for row, values in zip(distances, distance_rows(queries, database), strict=True):
        row[:] = values
    return distances


def rank(
    queries: UInt8[np.ndarray, "queries bytes"], database: UInt8[np.ndarray, "database bytes"], k: int
) -> Int32[np.ndarray, "queries k"]:
    """Returns the positions of each query's k nearest database codes, nearest first, ties in database order.

    Beside the result, only one query's distances are held at a time.

    Raises:
      ValueError: if the codes are not packed uint8, are empty or differ in width, or if k is not in
        1..database.
    """
    check_codes(queries, database)
    check_k(k, len(database))
    ranks = np.empty((len(queries), k), np.int32)
    for row, distances in zip(ranks, distance_rows(queries, database), strict=True):
        row[:] = nearest(distances, k)
    return ranks


def distance_rows(
    queries: UInt8[np.ndarray, "queries bytes"], database: UInt8[np.ndarray, "database bytes"]
) -> Iterator[UInt8[np.ndarray, " database"] | UInt16[np.ndarray, " database"]]:
    """Yields, query by query, the Hamming distances to the whole database, in a buffer that is used again.

    The rows are uint8 up to 255 bits and uint16 beyond: the narrower, the faster all that follows.
    """
    database_words = as_words(database)
    size = len(database)
    distances = np.empty(size, np.uint8 if database.shape[1] * 8 <= 255 else np.uint16)
    differing = np.empty(min(size, _CHUNK), database_words.dtype)
    bit_counts = np.empty(len(differing), np.uint8)
    for query in as_words(queries).T:
        for start in range(0, size, _CHUNK):
            chunk = distances[start : start + _CHUNK]
            xor, count = differing[: len(chunk)], bit_counts[: len(chunk)]
            for position, (word, column) in enumerate(zip(query, database_words, strict=True)):
                np.bitwise_xor(column[start : start + _CHUNK], word, out=xor)
                if position == 0:
                    np.bitwise_count(xor, out=chunk)
                else:
                    np.bitwise_count(xor, out=count)
                    np.add(chunk, count, out=chunk)
        yield distances


def nearest(distances: Shaped[np.ndarray, " database"], k: int) -> Shaped[np.ndarray, " k"]:
    """Returns the positions of the k smallest distances, ascending, ties in order of position.

    Only the candidates within a bound are sorted. The bound comes from a sample: too wide, it costs a longer
    sort; where it leaves too few, the exact one takes its place.
    """
    sample = distances[:: max(1, len(distances) // _SAMPLE)].copy()
    expected = k * len(sample) / len(distances)
    bound = kth_distance(sample, min(len(sample), math.ceil(expected + 2 * math.sqrt(expected))))
    candidates = np.flatnonzero(distances <= bound)
    if len(candidates) < k:
        candidates = np.flatnonzero(distances <= kth_distance(distances, k))
    return candidates[np.argsort(distances[candidates], kind="stable")[:k]]


def kth_distance(distances: Shaped[np.ndarray, " database"], k: int) -> int:
    """Returns the k-th smallest distance, by bisection on how many distances lie at or below a value."""
    low, high = 0, int(distances.max())
    while low < high:
        middle = (low + high) // 2
        if np.count_nonzero(distances <= middle) >= k:
            high = middle
        else:
            low = middle + 1
    return low


def as_words(packed: UInt8[np.ndarray, "n bytes"]) -> Shaped[np.ndarray, "words n"]:
    """Returns rows of bytes as columns of machine words: one row per word, padded with zero bits.

    Rows of up to eight bytes become one word of 8, 16, 32 or 64 bits; longer ones, words of 64 bits. The
    order of bytes inside a word is the machine's, which XOR, AND and bit counts do not see.
    """
    n, width = packed.shape
    word = next((size for size in (1, 2, 4) if width <= size), 8)
    padded = np.zeros((n, -(-width // word) * word), np.uint8)
    padded[:, :width] = packed
    return np.ascontiguousarray(padded.view(f"u{word}").T)


def shares_bit(row: Shaped[np.ndarray, " words"], columns: Shaped[np.ndarray, "words n"]) -> Bool[np.ndarray, " n"]:
    """Returns which of n bit sets, in the form of `as_words`, have a member in common with one bit set."""
    common = columns[0] & row[0]
    for word, column in zip(row[1:], columns[1:], strict=True):
        common |= column & word
    return common != 0


def check_codes(queries: np.ndarray, database: np.ndarray, names: tuple[str, str] = ("queries", "database")) -> None:
    """Raises a ValueError, in the caller's `names`, unless both are packed codes of one width."""
    for codes, name in zip((queries, database), names, strict=True):
        check_packed(codes, name)
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"{names[0]} has shape {queries.shape} and {names[1]} {database.shape}, but both need the same "
            "number of bytes per code: hash both with the same model."
        )


def check_packed(packed: np.ndarray, name: str) -> None:
    """Raises a ValueError unless the argument called `name` is a non-empty uint8 array [n, bits/8]."""
    if packed.dtype != np.uint8 or packed.ndim != 2:
        raise ValueError(
            f"{name} must be uint8 codes of shape [n, bits/8], not {packed.dtype} of shape "
            f"{packed.shape}: pack them with cib_jax.pack_bits."
        )
    if packed.size == 0:
        raise ValueError(f"{name} is empty, with shape {packed.shape}: pass at least one code of at least one byte.")
    if packed.shape[1] > _MOST_BYTES:
        raise ValueError(
            f"{name} has shape {packed.shape}, but distances of codes of more than {_MOST_BYTES} bytes "
            "overflow uint16: use shorter codes."
        )


def check_k(k: int, database: int, name: str = "k") -> None:
    """Raises a ValueError unless k is in 1..database."""
    if not 1 <= k <= database:
        raise ValueError(f"{name} is {k}, but the database holds {database} codes: pass a {name} from 1 to {database}.")
