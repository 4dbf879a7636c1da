"""Going over queries in blocks of bounded memory, on all cores and devices, with results in the queries' order."""

import collections
import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Int64, Integer, Shaped, UInt, UInt8, UInt16, UInt32

# retrieval.blocks: Going over queries in blocks of bounded memory, on all cores and devices, with results in the queries' order.


# Distances of a block fit a core's caches; a block of many queries still outweighs the cost of handing it out.
_BLOCK_DISTANCES = 1 << 21
_MOST_QUERIES = 64

T = TypeVar("T")


def over_blocks(
    queries: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    work: Callable[[slice, UInt[Array, "height padded"]], T],
) -> Iterator[T]:
    """Yields `work(rows, distances)` of block after block, in order, while later ones are worked at.

    `rows` names the block's queries. Of the distances, rows beyond those are filling, and so are columns beyond the
    database; see `distances.hamming`. `work` runs in several threads at once; the blocks go round this process's
    devices, each of which holds the database.
    """
    padded = padded_size(len(database))
    words = [jax.device_put(as_words(database, padded), device) for device in jax.local_devices()]
    query_words = as_words(queries)
    height = block_height(len(queries), padded)

    def one(start: int) -> T:
        block = query_words[:, start : start + height]
        rows = block.shape[1]
        whole = np.pad(block, ((0, 0), (0, height - rows)))
        near = words[start // height % len(words)]
        return work(slice(start, start + rows), hamming(whole, near, len(database)))

    yield from _in_order(one, range(0, len(queries), height))


def block_height(queries: int, padded: int) -> int:
    """Returns how many queries make a block against a database of `padded` columns: a power of two."""
    most = min(_MOST_QUERIES, max(1, _BLOCK_DISTANCES // padded), queries)
    return 1 << (most.bit_length() - 1)


def _in_order(work: Callable[[int], T], starts: range) -> Iterator[T]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(starts), cores)
    waiting: collections.deque[Future[T]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for start in starts:
                waiting.append(pool.submit(work, start))
                if len(waiting) > 2 * workers:  # what is done and not yet taken stays bounded too
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# retrieval.relevance: Which database images are relevant to a query: those that share a label with it.


class Relevance:
    """Whether database images are relevant to queries, asked by rank or for a whole block of queries.

    With integer labels [n], images of the query's class are; with multi-hot labels [n, classes], images that share at
    least one class with it. Both are kept as words of bits: a class number, or a set of classes.
    """

    def __init__(
        self, query_labels: Shaped[np.ndarray, "queries ..."], database_labels: Shaped[np.ndarray, "database ..."]
    ):
        self.size = len(database_labels)
        self._single = query_labels.ndim == 1
        both = np.concatenate([query_labels, database_labels])
        if self._single:
            # From 1 on, so that a filling of 0 is of no query's class.
            words = (np.unique(both, return_inverse=True)[1] + 1).astype(np.uint32)[None]
        else:
            words = as_words(np.packbits(both.astype(np.bool_), axis=1))
        self._queries, self._database = words[:, : len(query_labels)], words[:, len(query_labels) :]
        self._on_device: UInt32[Array, "words padded"] | None = None

    def ranked(self, rows: slice, ranks: Integer[np.ndarray, "queries k"]) -> Bool[np.ndarray, "queries k"]:
        """Returns whether the images at `ranks` are relevant to the queries `rows`."""
        queries = self._queries[:, rows, None]
        if self._single:
            return self._database[0][ranks] == queries[0]
        common = self._database[0][ranks] & queries[0]
        for query, column in zip(queries[1:], self._database[1:], strict=True):
            common |= column[ranks] & query
        return common != 0

    def whole(self, rows: slice, height: int, padded: int) -> Bool[Array, "height padded"]:
        """Returns the same for all images, filled up with rows and columns that mean nothing."""
        if self._on_device is None:
            self._on_device = jnp.asarray(np.pad(self._database, ((0, 0), (0, padded - self.size))))
        queries = self._queries[:, rows]
        queries = np.pad(queries, ((0, 0), (0, height - queries.shape[1])))
        return (_equal if self._single else _share)(queries, self._on_device)


@jax.jit
def _equal(queries: UInt32[Array, "1 queries"], database: UInt32[Array, "1 n"]) -> Bool[Array, "queries n"]:
    return queries[0][:, None] == database[0]


@jax.jit
def _share(queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"]) -> Bool[Array, "queries n"]:
    return jnp.any(queries[:, :, None] & database[:, None] != 0, axis=0)


def validate_labels(
    query_codes: np.ndarray, database_codes: np.ndarray, query_labels: np.ndarray, database_labels: np.ndarray
) -> None:
    """Raises a ValueError unless both labels are of one kind and there is one per code."""
    for codes, labels, side in (
        (query_codes, query_labels, "query"),
        (database_codes, database_labels, "database"),
    ):
        _check_kind(labels, f"{side}_labels")
        if len(labels) != len(codes):
            raise ValueError(
                f"{side}_labels has shape {labels.shape} and {side}_codes {codes.shape}, but both need one "
                "row per image: pass the labels of the images that were hashed."
            )
    if query_labels.shape[1:] != database_labels.shape[1:]:
        raise ValueError(
            f"query_labels has shape {query_labels.shape} and database_labels {database_labels.shape}, but "
            "both must be class numbers [n] or multi-hot [n, classes] over the same classes: align them."
        )


def _check_kind(labels: np.ndarray, name: str) -> None:
    single = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    multi = labels.ndim == 2 and (labels.dtype == np.bool_ or np.issubdtype(labels.dtype, np.integer))
    if not (single or multi):
        raise ValueError(
            f"{name} must be integers [n] or multi-hot bool or integers [n, classes], not {labels.dtype} of "
            f"shape {labels.shape}: convert the labels."
        )
    if multi and (labels.shape[1] == 0 or np.any((labels != 0) & (labels != 1))):
        raise ValueError(
            f"{name} of shape {labels.shape} is not multi-hot, since it needs at least one class and only 0 "
            "and 1 as values: pass class numbers as [n]."
        )


# retrieval.distances: Hamming distances between a block of queries and a whole database, in the form that suits the platform.

# Programs are compiled per shape: a database is filled up to a multiple of this, or of 1/8 to 1/16 of its own size.
_LEAST_QUANTUM = 1 << 12


def as_words(packed: UInt8[np.ndarray, "n bytes"], n: int | None = None) -> UInt32[np.ndarray, "words n"]:
    """Returns rows of bytes as columns of 32-bit words, filled up with zero bits, and with zero columns up to `n`.

    The order of bytes inside a word is the machine's, which XOR, AND and bit counts do not see.
    """
    rows, width = packed.shape
    padded = np.zeros((rows if n is None else n, -(-width // 4) * 4), np.uint8)
    padded[:rows, :width] = packed
    return np.ascontiguousarray(padded.view(np.uint32).T)


def quantum(size: int) -> int:
    """Returns the power of two that the padded size of a database of `size` codes is a multiple of."""
    return max(_LEAST_QUANTUM, 1 << max(0, size.bit_length() - 4))


def padded_size(size: int) -> int:
    """Returns how many codes a database of `size` codes is filled up to."""
    return -(-size // quantum(size)) * quantum(size)


@jax.jit
def hamming(
    queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"], size: int
) -> UInt[Array, "queries n"]:
    """Returns the number of differing bits between every query and every database code.

    Columns from `size` on are padding; they hold the largest value of the type, which no distance reaches. The type
    is uint8 where 32 · words bits leave room for that, uint16 beyond: the narrower, the faster all that follows.
    """
    dtype = jnp.uint8 if 32 * len(database) < np.iinfo(np.uint8).max else jnp.uint16
    found = jax.lax.platform_dependent(
        queries,
        database,
        cpu=functools.partial(by_counting, dtype=dtype),
        default=lambda *codes: by_product(*codes).astype(dtype),
    )
    return jnp.where(jnp.arange(found.shape[1]) < size, found, jnp.iinfo(dtype).max)


def by_counting(
    queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"], dtype: jax.typing.DTypeLike
) -> UInt[Array, "queries n"]:
    """Returns the distances as bit counts of XORs, which a processor's vector unit fuses into one pass."""
    differing = jax.lax.population_count(queries[:, :, None] ^ database[:, None, :])
    return jnp.sum(differing.astype(dtype), axis=0, dtype=dtype)


def by_product(queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"]) -> Int[Array, "queries n"]:
    """Returns the distances as (bits − q · d) / 2 of ±1 codes, one matrix product, exact in integers."""
    product = jax.lax.dot_general(
        _signs(queries), _signs(database), (((0, 2), (0, 2)), ((), ())), preferred_element_type=jnp.int32
    )
    return (32 * len(database) - product) // 2


def _signs(words: UInt32[Array, "words n"]) -> Int[Array, "words n 32"]:
    return 1 - 2 * (words[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1).astype(jnp.int8)


# retrieval.host_ranking: Ranks and histograms of a block of rows of distances, on the host: NumPy calls that leave other threads free.
#
# Every call works on the whole block, so that threads meet at the interpreter's lock a few times a block, and none of
# them holds the lock while it works, which `np.bincount` would.

# About as many distances bound the k-th smallest well, in a tenth of the time that all of them take.
_SAMPLE = 1 << 12


def nearest_numpy(distances: UInt[np.ndarray, "queries n"], size: int, k: int) -> Int64[np.ndarray, "queries k"]:
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


def histograms_numpy(
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


# retrieval.device_ranking: Ranks and histograms of a block of rows of distances, on an accelerator: what `host_ranking` gives.


@functools.partial(jax.jit, static_argnames="k")
def nearest_jax(distances: UInt[Array, "queries n"], k: int) -> Int32[Array, "queries k"]:
    """Returns the positions of each row's k smallest distances, ascending, ties in order of position."""
    positions = jnp.broadcast_to(jnp.arange(distances.shape[1], dtype=jnp.int32), distances.shape)
    return jax.lax.sort((distances, positions), num_keys=1, is_stable=True)[1][:, :k]


@functools.partial(jax.jit, static_argnames="radii")
def histograms_jax(
    distances: UInt[Array, "queries n"], relevance: Bool[Array, "queries n"], radii: int
) -> Int32[Array, "queries 2 radii"]:
    """Returns how many irrelevant, and how many relevant images lie at each distance 0..radii−1 from each query.

    Padding, which is farther than that, falls into a bin of its own, which is left out.
    """
    bins = jnp.where(distances < radii, distances.astype(jnp.int32) + radii * relevance, 2 * radii)
    counts = jax.vmap(lambda row: jnp.bincount(row, length=2 * radii + 1))(bins)
    return counts[:, :-1].reshape(len(distances), 2, radii).astype(jnp.int32)


# retrieval.ranking: Exact Hamming ranking of packed codes, ties in database order.


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
    validate_codes(queries, database)
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
    validate_codes(queries, database)
    validate_k(k, len(database))
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
        return nearest_numpy(np.asarray(distances)[:count], size, k)
    return np.asarray(nearest_jax(distances, k))[:count]


def histograms(
    distances: UInt[Array, "height padded"], rows: slice, relevance: Relevance, radii: int
) -> Int64[np.ndarray, "queries 2 radii"]:
    """Returns how many irrelevant and relevant images lie at each distance, of a block of `over_blocks`."""
    count, whole = rows.stop - rows.start, relevance.whole(rows, *distances.shape)
    if _is_host():
        size = relevance.size
        return histograms_numpy(np.asarray(distances)[:count, :size], np.asarray(whole)[:count, :size], radii)
    return np.asarray(histograms_jax(distances, whole, radii))[:count].astype(np.int64)


def _is_host() -> bool:
    # XLA's CPU sorts are many times slower than NumPy's; an accelerator would wait for the host to sort.
    return jax.default_backend() == "cpu"


def validate_codes(queries: np.ndarray, database: np.ndarray, names: tuple[str, str] = ("queries", "database")) -> None:
    """Raises a ValueError, in the caller's `names`, unless both are packed codes of one width."""
    for codes, name in zip((queries, database), names, strict=True):
        validate_packed(codes, name)
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"{names[0]} has shape {queries.shape} and {names[1]} {database.shape}, but both need the same "
            "number of bytes per code: hash both with the same model."
        )


def validate_packed(packed: np.ndarray, name: str) -> None:
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


def validate_k(k: int, database: int, name: str = "k") -> None:
    """Raises a ValueError unless k is in 1..database."""
    if not 1 <= k <= database:
        raise ValueError(f"{name} is {k}, but the database holds {database} codes: pass a {name} from 1 to {database}.")
