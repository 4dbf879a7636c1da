"""Hamming distances, exact ranking and histograms of packed codes, in blocks of queries; ties in database order."""

import bisect
import functools
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Int64, Integer, Shaped, UInt, UInt8, UInt16, UInt32

from cib_jax.errors import UserError, whole_number
from cib_jax.files import map_in_order

# The distances of one block fit the caches of a core, yet computing them outweighs the cost of starting a block.
_BLOCK_DISTANCES = 1 << 21
MAX_QUERIES = 64
# Programs are compiled per shape: a database is padded to a multiple of this, or of 1/8 to 1/16 of its size.
_MIN_QUANTUM = 1 << 12
# A sample of this many distances bounds the k-th smallest well, in a tenth of the time that all of them take.
_SAMPLE = 1 << 12
# Distances are uint16: one more byte per code could exceed 65,535 bits, of which one value marks padding.
_MAX_BYTES = (np.iinfo(np.uint16).max - 1) // 8

T = TypeVar("T")


def hamming_distances(
    queries: UInt8[np.ndarray, "queries bytes"], database: UInt8[np.ndarray, "database bytes"]
) -> UInt16[np.ndarray, "queries database"]:
    """Returns the number of differing bits between every query and every database code.

    The whole matrix is kept in memory, two bytes an entry.

    Args:
      queries: Packed codes of the queries.
      database: Packed codes of the database.

    Raises:
      UserError: The codes are not packed uint8, are empty or differ in width.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> queries, database = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> cib.hamming_distances(queries, database).tolist()
      [[0, 1, 2]]
    """
    validate_codes(queries, database)
    matrix = np.empty((len(queries), len(database)), np.uint16)
    for rows, distances in over_blocks(queries, database, lambda rows, distances: (rows, np.asarray(distances))):
        matrix[rows] = distances[: rows.stop - rows.start, : len(database)]
    return matrix


def rank(
    queries: UInt8[np.ndarray, "queries bytes"], database: UInt8[np.ndarray, "database bytes"], k: int
) -> Int32[np.ndarray, "queries k"]:
    """Returns the positions of each query's k nearest database codes, nearest first, ties in database order.

    Besides the result, only the distances of a few blocks of queries are in memory at a time.

    Args:
      queries: Packed codes of the queries.
      database: Packed codes of the database.
      k: Number of positions for each query.

    Raises:
      UserError: The codes are not packed uint8, are empty or differ in width, or k is not in 1..database.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> queries, database = np.array([[0]], np.uint8), np.array([[3], [1], [2]], np.uint8)
      >>> cib.rank(queries, database, k=3).tolist()  # 1 and 2 differ in one bit each, 3 in two
      [[1, 2, 0]]
    """
    validate_codes(queries, database)
    validate_k(k, len(database))
    blocks = over_blocks(queries, database, lambda rows, distances: (rows, nearest(distances, rows, len(database), k)))
    ranks = np.empty((len(queries), k), np.int32)
    for rows, nearest_of_rows in blocks:
        ranks[rows] = nearest_of_rows
    return ranks


# Blocks of queries.


def over_blocks(
    queries: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    work: Callable[[slice, UInt[Array, "height padded"]], T],
) -> Iterator[T]:
    """Yields `work(rows, distances)` for each block of queries, in order, computed on all cores and devices.

    `work` takes the positions of the block's queries and their distances (`hamming`), in which rows and columns beyond
    those of the queries and the database are padding. Several threads call it at once. Each device of this process gets
    a copy of the database.
    """
    padded = padded_size(len(database))
    databases = [jax.device_put(as_words(database, padded), device) for device in jax.local_devices()]
    query_words = as_words(queries)
    # A power of two, so that few shapes are compiled.
    height = 1 << (min(MAX_QUERIES, max(1, _BLOCK_DISTANCES // padded), len(queries)).bit_length() - 1)

    def compute(start: int) -> T:
        block = query_words[:, start : start + height]
        rows = slice(start, start + block.shape[1])
        # The last block is padded to the height of the others, so that all run one compiled program.
        block = np.pad(block, ((0, 0), (0, height - block.shape[1])))
        return work(rows, hamming(block, databases[start // height % len(databases)], len(database)))

    # Threads suffice: XLA and NumPy release the interpreter's lock while they work.
    for _, result in map_in_order(compute, range(0, len(queries), height)):
        yield result


def padded_size(size: int) -> int:
    """Returns the number of columns, padding included, of a database of `size` codes."""
    quantum = max(_MIN_QUANTUM, 1 << max(0, size.bit_length() - 4))
    return -(-size // quantum) * quantum


def as_words(packed: UInt8[np.ndarray, "n bytes"], size: int | None = None) -> UInt32[np.ndarray, "words padded"]:
    """Returns rows of bytes as columns of 32-bit words, padded with zero bits, and with zero columns up to `size`.

    The order of bytes inside a word is the machine's; XOR, AND and bit counts do not depend on it.
    """
    rows, width = packed.shape
    padded = np.zeros((rows if size is None else size, -(-width // 4) * 4), np.uint8)
    padded[:rows, :width] = packed
    # Transposed, so that one word of many codes is contiguous: programs then vectorize over codes.
    return np.ascontiguousarray(padded.view(np.uint32).T)


# Distances of a block, in JAX.


@jax.jit
def hamming(
    queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"], size: int | Int[Array, ""]
) -> UInt[Array, "queries n"]:
    """Returns the number of differing bits between every query and every database code.

    Columns from `size` on are padding; they hold the largest value of the type, which no distance reaches. The type
    is uint8 if 32 · words bits leave room for that value, else uint16: the narrower, the faster ranking is.
    """
    dtype = jnp.uint8 if 32 * len(database) < np.iinfo(np.uint8).max else jnp.uint16
    # Chosen when the program is lowered, not by the default backend: an exported program may run elsewhere.
    distances = jax.lax.platform_dependent(
        queries,
        database,
        cpu=functools.partial(by_counting, dtype=dtype),
        default=lambda *words: by_product(*words).astype(dtype),
    )
    return jnp.where(jnp.arange(distances.shape[1]) < size, distances, jnp.iinfo(dtype).max)


def by_counting(
    queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"], dtype: jax.typing.DTypeLike
) -> UInt[Array, "queries n"]:
    """Returns the distances as bit counts of XORs, which a CPU's vector unit fuses into one pass."""
    differing = jax.lax.population_count(queries[:, :, None] ^ database[:, None, :])
    return jnp.sum(differing.astype(dtype), axis=0, dtype=dtype)


def by_product(queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"]) -> Int[Array, "queries n"]:
    """Returns the distances as (bits − q · d) / 2 of ±1 codes: one matrix product, exact in integers."""

    def signs(words: UInt32[Array, "words n"]) -> Int[Array, "words n 32"]:
        return 1 - 2 * (words[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1).astype(jnp.int8)

    product = jax.lax.dot_general(
        signs(queries), signs(database), (((0, 2), (0, 2)), ((), ())), preferred_element_type=jnp.int32
    )
    return (32 * len(database) - product) // 2


# Ranking and counting a block of distances: by NumPy on the host, by JAX on an accelerator.


def is_host() -> bool:
    """Returns whether blocks are ranked by NumPy: XLA's sorts are many times slower on a CPU, and fast elsewhere."""
    return jax.default_backend() == "cpu"


def nearest(
    distances: UInt[Array, "height padded"], rows: slice, size: int, k: int
) -> Integer[np.ndarray, "queries k"]:
    """Returns the positions of the k nearest codes for a block of `over_blocks`, nearest first, ties in order."""
    count = rows.stop - rows.start
    if is_host():
        return nearest_numpy(np.asarray(distances)[:count], size, k)
    return np.asarray(nearest_jax(distances, k))[:count]


def histograms(
    distances: UInt[Array, "height padded"], rows: slice, relevance: "Relevance", radii: int
) -> Int64[np.ndarray, "queries 2 radii"]:
    """Returns the numbers of irrelevant and of relevant images at each distance, for a block of `over_blocks`."""
    count, relevant = rows.stop - rows.start, relevance.matrix(rows, distances.shape[0])
    if is_host():
        size = relevance.size
        return histograms_numpy(np.asarray(distances)[:count, :size], np.asarray(relevant)[:count, :size], radii)
    return np.asarray(histograms_jax(distances, relevant, radii))[:count].astype(np.int64)


@functools.partial(jax.jit, static_argnames="k")
def nearest_jax(distances: UInt[Array, "queries n"], k: int) -> Int32[Array, "queries k"]:
    """Returns the positions of each row's k smallest distances, ascending, ties in order of position."""
    positions = jnp.broadcast_to(jnp.arange(distances.shape[1], dtype=jnp.int32), distances.shape)
    shift = (distances.shape[1] - 1).bit_length()
    if 8 * distances.dtype.itemsize + shift <= 32:
        # Distance and position in one number, no two of which are equal: a stable sort moves three arrays instead.
        keys = distances.astype(jnp.uint32) << shift | positions.astype(jnp.uint32)
        return (jax.lax.sort(keys, is_stable=False)[:, :k] & ((1 << shift) - 1)).astype(jnp.int32)
    return jax.lax.sort((distances, positions), num_keys=1, is_stable=True)[1][:, :k]


@functools.partial(jax.jit, static_argnames="radii")
def histograms_jax(
    distances: UInt[Array, "queries n"], relevance: Bool[Array, "queries n"], radii: int
) -> Int32[Array, "queries 2 radii"]:
    """Returns the numbers of irrelevant and of relevant images at each distance 0..radii−1 from each query."""
    # A comparison for each distance and radius, fused with the sums: `bincount` scatters, which TPUs do one by one.
    found = distances[:, None] == jnp.arange(radii, dtype=distances.dtype)[None, :, None]
    every = jnp.sum(found, axis=2, dtype=jnp.int32)
    relevant = jnp.sum(found & relevance[:, None], axis=2, dtype=jnp.int32)
    return jnp.stack((every - relevant, relevant), axis=1)


# The NumPy functions take a whole block per call: threads then compete for the interpreter's lock a few times a block,
# and none of these calls holds it while it works, which `np.bincount` would.


def nearest_numpy(distances: UInt[np.ndarray, "queries n"], size: int, k: int) -> Int64[np.ndarray, "queries k"]:
    """Returns the positions of each row's k smallest distances, ascending, ties in order of position.

    Only candidates within a bound are sorted, those of all rows at once. The bounds come from a sample: if one is too
    large, the sort takes longer; if one leaves fewer than k candidates, the exact bound replaces it. n is a multiple of
    8. Columns from `size` on are padding, the type's largest value.
    """
    rows, width = distances.shape
    bounds = _sampled_bounds(distances[:, :size], k)
    candidates, starts = _within(distances, bounds)
    short = np.flatnonzero(np.diff(starts) < k)
    if len(short):
        for row in short:
            bounds[row] = kth_distance(distances[row], k)
        candidates, starts = _within(distances, bounds)
    # Row and distance in one number, of 16 bits if possible: NumPy sorts those by counting.
    span = int(bounds.max()) + 1
    dtype = np.min_scalar_type(rows * span - 1)
    keys = np.repeat((np.arange(rows) * span).astype(dtype), np.diff(starts))
    keys += distances.reshape(-1)[candidates]
    order = np.argsort(keys, kind="stable")
    ranked = candidates[order[starts[:-1, None] + np.arange(k)]]
    ranked -= np.arange(rows)[:, None] * width
    return ranked


def _sampled_bounds(distances: UInt[np.ndarray, "queries size"], k: int) -> UInt[np.ndarray, " queries"]:
    """Returns, for each row, a distance that nearly always has at least k others within it, and hardly more."""
    size = distances.shape[1]
    sample = np.sort(distances[:, :: max(1, size // _SAMPLE)], axis=1, kind="stable")
    # About `expected` of the k smallest are in the sample, with a standard deviation of at most its square root.
    expected = k * sample.shape[1] / size
    return sample[:, min(sample.shape[1], math.ceil(expected + 3 * math.sqrt(expected))) - 1].copy()


def _within(
    distances: UInt[np.ndarray, "queries n"], bounds: UInt[np.ndarray, " queries"]
) -> tuple[Int64[np.ndarray, " found"], Int64[np.ndarray, " queries+1"]]:
    """Returns the flat positions of distances within their row's bound, and the start of each row among them."""
    found = true_positions(distances <= bounds[:, None])
    return found, np.searchsorted(found, np.arange(len(distances) + 1) * distances.shape[1])


def true_positions(mask: Bool[np.ndarray, "*shape"]) -> Int64[np.ndarray, " found"]:
    """Returns `np.flatnonzero(mask)` of a mask with few true values and a size that is a multiple of 8.

    In two steps, words of eight values and then single values: `np.flatnonzero` branches on every value, and
    processors predict rare ones badly.
    """
    words = mask.reshape(-1).view(np.uint64)
    occupied = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[occupied].view(np.bool_))
    found = (occupied << 3)[inside >> 3]
    found += inside & 7
    return found


def kth_distance(distances: UInt[np.ndarray, " n"], k: int) -> int:
    """Returns the k-th smallest distance, by bisection on the number of distances up to a value."""
    bounds = range(int(distances.max()))
    return bisect.bisect_left(bounds, k, key=lambda bound: int(np.count_nonzero(distances <= bound)))


def histograms_numpy(
    distances: UInt[np.ndarray, "queries size"], relevance: Bool[np.ndarray, "queries size"], radii: int
) -> Int64[np.ndarray, "queries 2 radii"]:
    """Returns the numbers of irrelevant and of relevant images at each distance 0..radii−1 from each query."""
    # One sort of small integers gives both: irrelevant images take the lower half of the bins, relevant ones the upper.
    dtype = np.min_scalar_type(2 * radii - 1)
    bins = np.multiply(relevance.view(np.uint8), radii, dtype=dtype)
    bins += distances
    bins.sort(axis=1, kind="stable")
    ends = np.stack([np.searchsorted(row, np.arange(2 * radii, dtype=dtype), "right") for row in bins])
    return np.diff(ends, axis=1, prepend=0).reshape(len(bins), 2, radii)


# Relevance.


class Relevance:
    """Relevance of database images to queries, by rank or for a whole block of queries.

    With class numbers [n], images of the query's class are relevant; with multi-hot labels [n, classes], images that
    share at least one class with it. Both are kept as words of bits: a class number, or a set of classes.
    """

    def __init__(
        self, query_labels: Shaped[np.ndarray, "queries ..."], database_labels: Shaped[np.ndarray, "database ..."]
    ):
        self.size = len(database_labels)
        self._single = query_labels.ndim == 1
        both = np.concatenate([query_labels, database_labels])
        if self._single:
            # From 1 on: padding is 0, which then is not the class of any query.
            words = (np.unique(both, return_inverse=True)[1] + 1).astype(np.uint32)[None]
        else:
            words = as_words(np.packbits(both.astype(np.bool_), axis=1))
        self._queries, self._database = words[:, : len(query_labels)], words[:, len(query_labels) :]
        self._padded = jnp.asarray(np.pad(self._database, ((0, 0), (0, padded_size(self.size) - self.size))))

    def ranked(self, rows: slice, ranks: Integer[np.ndarray, "queries k"]) -> Bool[np.ndarray, "queries k"]:
        """Returns whether the images at `ranks` are relevant to the queries `rows`."""
        queries = self._queries[:, rows, None]
        if self._single:
            return self._database[0][ranks] == queries[0]
        common = self._database[0][ranks] & queries[0]
        for query, column in zip(queries[1:], self._database[1:], strict=True):
            common |= column[ranks] & query
        return common != 0

    def matrix(self, rows: slice, height: int) -> Bool[Array, "height padded"]:
        """Returns whether each image is relevant to each of the queries `rows`; padding is relevant to none."""
        queries = self._queries[:, rows]
        queries = np.pad(queries, ((0, 0), (0, height - queries.shape[1])))
        return _are_relevant(queries, self._padded, self._single)


@functools.partial(jax.jit, static_argnums=2)
def _are_relevant(
    queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"], single: bool
) -> Bool[Array, "queries n"]:
    pairs = queries[:, :, None], database[:, None]
    return jnp.any(pairs[0] == pairs[1] if single else pairs[0] & pairs[1] != 0, axis=0)


# Validation of arguments.


def validate_codes(queries: np.ndarray, database: np.ndarray, names: tuple[str, str] = ("queries", "database")) -> None:
    """Raises a UserError, in the caller's `names`, unless both are packed codes of one width."""
    for codes, name in zip((queries, database), names, strict=True):
        validate_packed(codes, name)
    if queries.shape[1] != database.shape[1]:
        raise UserError(
            f"{names[0]} has shape {queries.shape} and {names[1]} {database.shape}, but both must have the same "
            "number of bytes per code; encode both with the same model",
            field=names[0],
        )


def validate_packed(packed: np.ndarray, name: str) -> None:
    """Raises a UserError unless the argument called `name` is a non-empty uint8 array [n, bits/8]."""
    if packed.dtype != np.uint8 or packed.ndim != 2:
        allowed, remedy = "be uint8 codes of shape [n, bits/8]", "pack them with cib_jax.pack_bits"
    elif packed.size == 0:
        allowed, remedy = "have at least one code of at least one byte", "pass more codes"
    elif packed.shape[1] > _MAX_BYTES:
        allowed = f"have at most {_MAX_BYTES} bytes per code, since distances are uint16"
        remedy = "use shorter codes"
    else:
        return
    raise UserError(f"{name} must {allowed}, got {packed.dtype} of shape {packed.shape}; {remedy}", field=name)


def validate_k(k: int, database: int, name: str = "k") -> None:
    """Raises a UserError unless k is in 1..database."""
    if whole_number(name, k, 1) > database:
        raise UserError(f"{name} must be from 1 to {database}, the size of the database, got {k}", field=name)


def validate_labels(
    query_codes: np.ndarray, database_codes: np.ndarray, query_labels: np.ndarray, database_labels: np.ndarray
) -> None:
    """Raises a UserError unless both labels are of one kind and there is one per code."""
    sides = (query_codes, query_labels, "query"), (database_codes, database_labels, "database")
    for codes, labels, side in sides:
        _validate_kind(labels, f"{side}_labels")
        if len(labels) != len(codes):
            raise UserError(
                f"{side}_labels has shape {labels.shape} and {side}_codes {codes.shape}, but both must have one row "
                "per image; pass the labels of the encoded images",
                field=f"{side}_labels",
            )
    if query_labels.shape[1:] != database_labels.shape[1:]:
        raise UserError(
            f"query_labels has shape {query_labels.shape} and database_labels {database_labels.shape}, but both must "
            "be class numbers [n] or multi-hot [n, classes] over the same classes; align them",
            field="query_labels",
        )


def _validate_kind(labels: np.ndarray, name: str) -> None:
    single = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    multi = labels.ndim == 2 and (labels.dtype == np.bool_ or np.issubdtype(labels.dtype, np.integer))
    if not (single or multi):
        allowed, remedy = "integers [n] or multi-hot bool or integers [n, classes]", "convert them"
    elif multi and (labels.shape[1] == 0 or np.any((labels != 0) & (labels != 1))):
        allowed = "multi-hot, with at least one class and only 0 and 1 as values"
        remedy = "pass class numbers as [n]"
    else:
        return
    raise UserError(f"{name} must be {allowed}, got {labels.dtype} of shape {labels.shape}; {remedy}", field=name)
