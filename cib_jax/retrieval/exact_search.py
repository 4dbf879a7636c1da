"""Exact search in packed codes where they lie, by FAISS's bit counts; ties in database order."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from cib_jax.retrieval import faiss_threads

# Codes that bound the k-th distance before FAISS is asked, and codes of one question: results come block by block.
_FIRST = 1 << 14
_BLOCK = 1 << 20
# Codes that one thread looks at before it takes new work.
_TASK = 1 << 18
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
    then, which is one answer whatever the order; blocks double in size, so that each brings about k more.
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
    one: Callable[[UInt8[np.ndarray, "1 bytes"], UInt8[np.ndarray, "part bytes"]], Hits],
) -> list[list[Hits]]:
    """Returns `one(query, part)` of each query and each part of the database, positions counted from its start."""
    rows = max(1, min(_TASK // len(codes), -(-len(queries) // faiss_threads.cores())))
    parts = max(1, min(faiss_threads.cores() // len(queries), len(codes) // _TASK))
    bounds = [len(codes) * part // parts for part in range(parts + 1)]

    def task(start: int) -> list[list[Hits]]:
        return [[one(queries[row : row + 1], codes)] for row in range(start, min(start + rows, len(queries)))]

    def part(row: int, begin: int, end: int) -> Hits:
        distances, ids = one(queries[row : row + 1], codes[begin:end])
        return Hits(distances, ids + begin)

    if parts == 1:
        calls = [functools.partial(task, start) for start in range(0, len(queries), rows)]
        return [hits for several in faiss_threads.in_order(calls) for hits in several]
    pieces = [
        functools.partial(part, row, begin, end)
        for row in range(len(queries))
        for begin, end in itertools.pairwise(bounds)
    ]
    found = faiss_threads.in_order(pieces)
    return [found[start : start + parts] for start in range(0, len(found), parts)]


def _nearest(query: UInt8[np.ndarray, "1 bytes"], codes: UInt8[np.ndarray, "n bytes"], k: int) -> Hits:
    begin = min(len(codes), max(_FIRST, 4 * k))
    distances = _counted(query, codes[:begin])
    bound = np.partition(distances, min(k, begin) - 1)[min(k, begin) - 1]
    ids = np.flatnonzero(distances <= bound)
    found = _first([Hits(distances[ids], ids)], k)
    while begin < len(codes) and found.distances[-1] > 0:
        end = min(len(codes), begin + min(begin, _BLOCK))
        # A later code as far as the k-th comes after it.
        nearer = _nearer(query, codes[begin:end], int(found.distances[-1]))
        if len(nearer.ids):
            found = _first([found, Hits(nearer.distances, nearer.ids + begin)], k)
        begin = end
    return found


def _within(query: UInt8[np.ndarray, "1 bytes"], codes: UInt8[np.ndarray, "n bytes"], radius: int) -> Hits:
    found = []
    for begin in range(0, len(codes), _BLOCK):
        distances, ids = _nearer(query, codes[begin : begin + _BLOCK], radius + 1)
        found.append(Hits(distances, ids + begin))
    return Hits(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


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
    faiss = faiss_threads.load()
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
