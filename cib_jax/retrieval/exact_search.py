"""Exact search in packed codes by FAISS's bit counts, on all cores; ties in database order.

FAISS spreads one call over all cores by OpenMP, and OpenMP's threads wait for each other by spinning: beside other
work, a query that takes 1 ms was measured to take 70. Here each call stays in one thread of a pool, and the threads
share the queries or, if these are few, parts of the database.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from cib_jax.errors import SearchError
from cib_jax.files import core_count, import_optional, install_command

# Codes that bound the k-th distance before FAISS is called.
FIRST = 1 << 14
# Queries that go through the database together, in blocks of codes that stay in a core's cache: otherwise a large
# database is read from memory once for each query.
ROWS = 16
BLOCK_BYTES = 1 << 22
# Codes that are worth a thread: a millisecond of work.
TASK = 1 << 21
COUNTED_BYTES = 1 << 20
# Hits for which FAISS allocates memory at a time. Its default of 262,144 hits is 3 MB, which the system must clear for
# every query that finds one.
BUFFERED_HITS = 1 << 11

T = TypeVar("T")
Codes = UInt8[np.ndarray, "n bytes"]
Queries = UInt8[np.ndarray, "queries bytes"]
Query = UInt8[np.ndarray, "1 bytes"]
Advance = Callable[[int], None]


class Hits(NamedTuple):
    """Codes found for one query: nearest first, ties in database order."""

    distances: Int32[np.ndarray, " hits"]
    ids: Int64[np.ndarray, " hits"]


def nearest(
    codes: Codes, queries: Queries, k: int, advance: Advance = lambda queries: None
) -> tuple[Int32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
    """Returns distances and positions of each query's k nearest codes, with k in 1..n; both arrays are contiguous.

    FAISS's own k-nearest search promises no order of ties. So its range search is used: for each block of codes, it
    returns all that are nearer than the k-th nearest so far, which is the same set in any order. A block is at most
    three times as large as all before it together, so that it brings about 3 k hits.
    """
    found = _search_all(queries, codes, functools.partial(_nearest, k=k), advance)
    hits = [_first(parts, k) for parts in found]
    return np.stack([hit.distances for hit in hits]), np.stack([hit.ids for hit in hits])


def within(codes: Codes, queries: Queries, radius: int, advance: Advance = lambda queries: None) -> list[Hits]:
    """Returns, for each query, all codes that differ from it in at most `radius` bits; both arrays are contiguous."""
    found = _search_all(queries, codes, functools.partial(_within, radius=radius), advance)
    return [_first(parts, len(codes)) for parts in found]


def _search_all(
    queries: Queries, codes: Codes, search: Callable[[Queries, Codes], list[Hits]], advance: Advance
) -> list[list[Hits]]:
    """Returns, for each query, its hits in the whole database or, if queries are few, in each part of it.

    `advance` is called with the number of queries of each call, unless the queries are few.
    """
    rows = max(1, min(max(ROWS, TASK // len(codes)), -(-len(queries) // core_count())))
    parts = max(1, min(core_count() // len(queries), len(codes) // TASK))

    def search_piece(begin: int, end: int, start: int) -> list[Hits]:
        hits = search(queries[start : start + rows], codes[begin:end])
        return [Hits(some.distances, some.ids + begin) for some in hits]

    bounds = itertools.pairwise(len(codes) * part // parts for part in range(parts + 1))
    pieces = itertools.product(bounds, range(0, len(queries), rows))
    # All queries in the first part, then all in the second, …
    calls = (functools.partial(search_piece, *part, start) for part, start in pieces)
    found = run_in_order(calls, lambda hits: advance(len(hits) if parts == 1 else 0))
    by_part = list(itertools.chain.from_iterable(found))
    return [by_part[row :: len(queries)] for row in range(len(queries))]


def _nearest(queries: Queries, codes: Codes, k: int) -> list[Hits]:
    begin = min(len(codes), max(FIRST, 4 * k))
    found = [_nearest_of_first(query, codes[:begin], k) for query in queries[:, None]]
    most = max(FIRST, BLOCK_BYTES // codes.shape[1])
    while begin < len(codes):
        block = codes[begin : begin + min(3 * begin, most)]
        for row, hits in enumerate(found):
            # Strictly nearer than the k-th: a later code at its distance comes after it. At 0, nothing can be nearer.
            if bound := int(hits.distances[-1]):
                nearer = _nearer(queries[row : row + 1], block, bound, begin)
                if len(nearer.ids):
                    found[row] = _first([hits, nearer], k)
        begin += len(block)
    return found


def _nearest_of_first(query: Query, codes: Codes, k: int) -> Hits:
    distances, k = _distances(query, codes), min(k, len(codes))
    ids = np.flatnonzero(distances <= np.partition(distances, k - 1)[k - 1])
    return _first([Hits(distances[ids], ids)], k)


def _within(queries: Queries, codes: Codes, radius: int) -> list[Hits]:
    most = max(FIRST, BLOCK_BYTES // codes.shape[1])
    found: list[list[Hits]] = [[] for _ in queries]
    for begin in range(0, len(codes), most):
        for row, several in enumerate(found):
            several.append(_nearer(queries[row : row + 1], codes[begin : begin + most], radius + 1, begin))
    return [Hits(*(np.concatenate(parts) for parts in zip(*several, strict=True))) for several in found]


def _first(parts: list[Hits], k: int) -> Hits:
    """Returns the k nearest hits of several parts of the database, or all if there are fewer."""
    distances, ids = (np.concatenate(several) if len(parts) > 1 else several[0] for several in zip(*parts, strict=True))
    order = np.lexsort((ids, distances))[:k]
    return Hits(distances[order], ids[order])


def _distances(query: Query, codes: Codes) -> Int32[np.ndarray, " n"]:
    word = np.uint64 if codes.shape[1] % 8 == 0 else np.uint8
    rows = max(1, COUNTED_BYTES // codes.shape[1])
    distances = np.empty(len(codes), np.int32)
    for start in range(0, len(codes), rows):
        differing = np.bitwise_count(codes[start : start + rows].view(word) ^ query.view(word))
        np.sum(differing, axis=1, dtype=np.int32, out=distances[start : start + rows])
    return distances


def _nearer(query: Query, codes: Codes, distance: int, begin: int) -> Hits:
    """Returns all codes that differ from the query in fewer than `distance` bits, in any order, ids from `begin` on."""
    faiss = load_faiss()
    found = faiss.RangeSearchResult(1)
    found.buffer_size = BUFFERED_HITS
    faiss.hamming_range_search(
        faiss.swig_ptr(query), faiss.swig_ptr(codes), 1, len(codes), distance, codes.shape[1], found
    )
    count = int(faiss.rev_swig_ptr(found.lims, 2)[1])
    if not count:
        return Hits(np.empty(0, np.int32), np.empty(0, np.int64))
    # Copies: FAISS frees its memory with `found`.
    distances = faiss.rev_swig_ptr(found.distances, count).astype(np.int32)
    return Hits(distances, faiss.rev_swig_ptr(found.labels, count) + begin)


# FAISS and its threads.


def load_faiss() -> ModuleType:
    """Returns the module `faiss`, imported at its first use."""
    message = f"Searching needs the package FAISS; {install_command('search')}"
    missing = SearchError(message, field="--index")
    return import_optional("faiss", missing)


def run_in_order(calls: Iterable[Callable[[], T]], done: Callable[[T], None] = lambda result: None) -> list[T]:
    """Returns the results of the calls, in order, and calls `done` with each of them.

    Any number of threads may use it at once, but not a call itself.
    """
    several = list(calls)
    if len(several) == 1:  # handing it to a thread would take a tenth of a millisecond
        faiss = load_faiss()
        before = faiss.omp_get_max_threads()  # OpenMP's number is each thread's own
        faiss.omp_set_num_threads(1)
        try:
            return [several[0]()]
        finally:
            faiss.omp_set_num_threads(before)
    # By process: one that was forked off has none of its parent's threads.
    pool = _pool(os.getpid())
    waiting = [pool.submit(call) for call in several]
    try:
        results = []
        for future in waiting:
            results.append(future.result())
            done(results[-1])
        return results
    finally:
        for future in waiting:
            future.cancel()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    del process
    return ThreadPoolExecutor(core_count(), "search", initializer=lambda: load_faiss().omp_set_num_threads(1))
