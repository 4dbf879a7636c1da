"""FAISS, imported when it is used, and the threads in which it works: each call on one core, many calls at once.

FAISS spreads one call over all cores by OpenMP, whose threads wait for each other by spinning: beside other work, a
query that takes 1 ms took 70 so. Here each call stays in its thread, and the threads share queries or, where there are
few, parts of the database."""

import contextlib
import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from cib_jax.errors import SearchError

# retrieval.faiss_threads: FAISS, imported when it is used, and the threads in which it works: each call on one core, many calls at once.
#
# FAISS spreads one call over all cores by OpenMP, whose threads wait for each other by spinning: beside other work, a
# query that takes 1 ms took 70 so. Here each call stays in its thread, and the threads share queries or, where there are
# few, parts of the database.


T = TypeVar("T")


def load_faiss() -> ModuleType:
    """Returns the module `faiss`.

    Raises:
      SearchError: it is not installed.
    """
    if importlib.util.find_spec("faiss") is None:
        raise SearchError("Index: searching wants a package more, FAISS; pip install 'cib-jax[search]'")
    import faiss

    return faiss


def core_count() -> int:
    """Returns how many calls run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(calls: Iterable[Callable[[], T]]) -> list[T]:
    """Returns what the calls return, in their order. Any number of threads may ask at once; no call may ask itself."""
    several = list(calls)
    if len(several) == 1:  # to hand it to a thread would take a tenth of a millisecond
        with _one_core():
            return [several[0]()]
    # A process that was forked off has none of its parent's threads.
    pool = _pool(os.getpid())
    waiting = [pool.submit(call) for call in several]
    try:
        return [future.result() for future in waiting]
    finally:
        for future in waiting:
            future.cancel()


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Keeps FAISS's calls of this thread on one core; what else it does with OpenMP keeps its threads."""
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    del process
    # The number is the calling thread's own: what else this process does with OpenMP keeps its threads.
    return ThreadPoolExecutor(core_count(), "search", initializer=lambda: load_faiss().omp_set_num_threads(1))


# retrieval.exact_search: Exact search in packed codes where they lie, by FAISS's bit counts; ties in database order.


# Codes that bound the k-th distance before FAISS is asked.
_FIRST = 1 << 14
# Queries that go through the database together, and codes that stay in a core's cache meanwhile: else a large database
# comes from memory once for each query.
_ROWS = 16
_BLOCK_BYTES = 1 << 22
# Codes worth a thread: a millisecond of work.
_TASK = 1 << 21
_COUNTED_BYTES = 1 << 20
# Hits for which FAISS takes memory; its 262,144 are 3 MB, which the system clears anew for every query that finds one.
_HITS_AT_ONCE = 1 << 11


class Hits(NamedTuple):
    """What was found for one query: nearest first, ties in database order."""

    distances: Int32[np.ndarray, " hits"]
    ids: Int64[np.ndarray, " hits"]


def nearest(
    codes: UInt8[np.ndarray, "n bytes"], queries: UInt8[np.ndarray, "queries bytes"], k: int
) -> tuple[Int32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
    """Returns distances and positions of each query's k nearest codes, k being in 1..n; both arrays contiguous.

    FAISS's own search promises no order of ties. So it is asked for all codes of a block nearer than the k-th known by
    then, which is one answer whatever the order; a block is three times all before it, so it brings about 3 k more.
    """
    found = _each(queries, codes, functools.partial(_nearest, k=k))
    hits = [_first(parts, k) for parts in found]
    return np.stack([hit.distances for hit in hits]), np.stack([hit.ids for hit in hits])


def within(codes: UInt8[np.ndarray, "n bytes"], queries: UInt8[np.ndarray, "queries bytes"], radius: int) -> list[Hits]:
    """Returns, for each query, all codes that differ from it in at most `radius` bits; both arrays contiguous."""
    found = _each(queries, codes, functools.partial(_within, radius=radius))
    return [_first(parts, len(codes)) for parts in found]


def _each(
    queries: UInt8[np.ndarray, "queries bytes"],
    codes: UInt8[np.ndarray, "n bytes"],
    some: Callable[[UInt8[np.ndarray, "rows bytes"], UInt8[np.ndarray, "part bytes"]], list[Hits]],
) -> list[list[Hits]]:
    """Returns what `some` finds for each query, in the whole database or, where queries are few, in each part of it."""
    rows = max(1, min(max(_ROWS, _TASK // len(codes)), -(-len(queries) // core_count())))
    parts = max(1, min(core_count() // len(queries), len(codes) // _TASK))

    def piece(start: int, begin: int, end: int) -> list[Hits]:
        return [
            Hits(hits.distances, hits.ids + begin) for hits in some(queries[start : start + rows], codes[begin:end])
        ]

    bounds = [len(codes) * part // parts for part in range(parts + 1)]
    pieces = [
        [functools.partial(piece, start, begin, end) for start in range(0, len(queries), rows)]
        for begin, end in itertools.pairwise(bounds)
    ]
    found = in_order(itertools.chain.from_iterable(pieces))
    # One list of hits for each query, part after part.
    by_query = list(itertools.chain.from_iterable(found))
    return [by_query[row :: len(queries)] for row in range(len(queries))]


def _nearest(queries: UInt8[np.ndarray, "rows bytes"], codes: UInt8[np.ndarray, "n bytes"], k: int) -> list[Hits]:
    begin = min(len(codes), max(_FIRST, 4 * k))
    found = [_nearest_of_first(query, codes[:begin], k) for query in queries[:, None]]
    most = max(_FIRST, _BLOCK_BYTES // codes.shape[1])
    while begin < len(codes):
        block = codes[begin : begin + min(3 * begin, most)]
        for row, hits in enumerate(found):
            # A later code as far as the k-th comes after it.
            if bound := int(hits.distances[-1]):
                nearer = _nearer(queries[row : row + 1], block, bound)
                if len(nearer.ids):
                    found[row] = _first([hits, Hits(nearer.distances, nearer.ids + begin)], k)
        begin += len(block)
    return found


def _nearest_of_first(query: UInt8[np.ndarray, "1 bytes"], codes: UInt8[np.ndarray, "n bytes"], k: int) -> Hits:
    distances, k = _counted(query, codes), min(k, len(codes))
    ids = np.flatnonzero(distances <= np.partition(distances, k - 1)[k - 1])
    return _first([Hits(distances[ids], ids)], k)


def _within(queries: UInt8[np.ndarray, "rows bytes"], codes: UInt8[np.ndarray, "n bytes"], radius: int) -> list[Hits]:
    most = max(_FIRST, _BLOCK_BYTES // codes.shape[1])
    found: list[list[Hits]] = [[] for _ in queries]
    for begin in range(0, len(codes), most):
        for row, several in enumerate(found):
            distances, ids = _nearer(queries[row : row + 1], codes[begin : begin + most], radius + 1)
            several.append(Hits(distances, ids + begin))
    return [Hits(*(np.concatenate(parts) for parts in zip(*several, strict=True))) for several in found]


def _first(parts: list[Hits], k: int) -> Hits:
    """Returns the k nearest of several finds, or all if there are fewer."""
    distances, ids = (np.concatenate(several) if len(parts) > 1 else several[0] for several in zip(*parts, strict=True))
    order = np.lexsort((ids, distances))[:k]
    return Hits(distances[order], ids[order])


def _counted(query: UInt8[np.ndarray, "1 bytes"], codes: UInt8[np.ndarray, "n bytes"]) -> Int32[np.ndarray, " n"]:
    words = np.uint64 if codes.shape[1] % 8 == 0 else np.uint8
    rows = max(1, _COUNTED_BYTES // codes.shape[1])
    counted = np.empty(len(codes), np.int32)
    for start in range(0, len(codes), rows):
        differing = np.bitwise_count(codes[start : start + rows].view(words) ^ query.view(words))
        np.sum(differing, axis=1, dtype=np.int32, out=counted[start : start + rows])
    return counted


def _nearer(query: UInt8[np.ndarray, "1 bytes"], codes: UInt8[np.ndarray, "n bytes"], distance: int) -> Hits:
    """Returns all codes that differ from the query in fewer than `distance` bits, in no order that FAISS promises."""
    faiss = load_faiss()
    found = faiss.RangeSearchResult(1)
    found.buffer_size = _HITS_AT_ONCE
    faiss.hamming_range_search(
        faiss.swig_ptr(query), faiss.swig_ptr(codes), 1, len(codes), distance, codes.shape[1], found
    )
    count = int(faiss.rev_swig_ptr(found.lims, 2)[1])
    if not count:
        return Hits(np.empty(0, np.int32), np.empty(0, np.int64))
    # Both are FAISS's memory, which goes with `found`.
    distances = faiss.rev_swig_ptr(found.distances, count).astype(np.int32)
    return Hits(distances, faiss.rev_swig_ptr(found.labels, count).copy())
