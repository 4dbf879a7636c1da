"""Exact Hamming ranking of packed codes, ties in database order."""

import jax
import numpy as np
from jaxtyping import Array, Int32, Int64, Integer, UInt, UInt8, UInt16

from cib_jax.retrieval import device_ranking, host_ranking
from cib_jax.retrieval.blocks import over_blocks
from cib_jax.retrieval.relevance import Relevance

# Distances are uint16: one more byte per code could exceed 65,535 bits, of which one value marks padding.
_MOST_BYTES = (np.iinfo(np.uint16).max - 1) // 8


def hamming_distances(
    queries: UInt8[np.ndarray, "queries bytes"], database: UInt8[np.ndarray, "database bytes"]
) -> UInt16[np.ndarray, "queries database"]:
    """Returns the number of differing bits between every query and every database code.

    The whole matrix is held, two bytes an entry.

    Raises:
      ValueError: if the codes are not packed uint8, are empty, or differ in width.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> queries, database = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> cib.hamming_distances(queries, database).tolist()
      [[0, 1, 2]]
    """
    check_codes(queries, database)
    found = np.empty((len(queries), len(database)), np.uint16)

    def fill(rows: slice, distances: UInt[Array, "height padded"]) -> None:
        found[rows] = np.asarray(distances)[: rows.stop - rows.start, : len(database)]

    for _ in over_blocks(queries, database, fill):
        pass
    return found


def rank(
    queries: UInt8[np.ndarray, "queries bytes"], database: UInt8[np.ndarray, "database bytes"], k: int
) -> Int32[np.ndarray, "queries k"]:
    """Returns the positions of each query's k nearest database codes, nearest first, ties in database order.

    Beside the result, only the distances of a few blocks of queries are held at a time.

    Raises:
      ValueError: if the codes are not packed uint8, are empty or differ in width, or if k is not in
        1..database.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> queries, database = np.array([[0]], np.uint8), np.array([[3], [1], [2]], np.uint8)
      >>> cib.rank(queries, database, k=3).tolist()  # 1 and 2 differ in one bit each, 3 in two
      [[1, 2, 0]]
    """
    check_codes(queries, database)
    check_k(k, len(database))
    ranks = np.empty((len(queries), k), np.int32)

    def fill(rows: slice, distances: UInt[Array, "height padded"]) -> None:
        ranks[rows] = nearest(distances, rows, len(database), k)

    for _ in over_blocks(queries, database, fill):
        pass
    return ranks


def nearest(
    distances: UInt[Array, "height padded"], rows: slice, size: int, k: int
) -> Integer[np.ndarray, "queries k"]:
    """Returns the positions of the k nearest of a block of `over_blocks`, where the platform does it best."""
    count = rows.stop - rows.start
    if _is_host():
        return host_ranking.nearest(np.asarray(distances)[:count], size, k)
    return np.asarray(device_ranking.nearest(distances, k))[:count]


def histograms(
    distances: UInt[Array, "height padded"], rows: slice, relevance: Relevance, radii: int
) -> Int64[np.ndarray, "queries 2 radii"]:
    """Returns how many irrelevant and relevant images lie at each distance, of a block of `over_blocks`."""
    count, whole = rows.stop - rows.start, relevance.whole(rows, *distances.shape)
    if _is_host():
        size = relevance.size
        return host_ranking.histograms(np.asarray(distances)[:count, :size], np.asarray(whole)[:count, :size], radii)
    return np.asarray(device_ranking.histograms(distances, whole, radii))[:count].astype(np.int64)


def _is_host() -> bool:
    # XLA's CPU sorts are many times slower than NumPy's; an accelerator would wait for the host to sort.
    return jax.default_backend() == "cpu"


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
