"""Going over queries in blocks of bounded memory, on all cores and devices, with results in the queries' order."""

import collections
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Array, UInt, UInt8

from cib_jax.retrieval import distances

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
    padded = distances.padded_size(len(database))
    words = [jax.device_put(distances.as_words(database, padded), device) for device in jax.local_devices()]
    query_words = distances.as_words(queries)
    height = block_height(len(queries), padded)

    def one(start: int) -> T:
        block = query_words[:, start : start + height]
        rows = block.shape[1]
        whole = np.pad(block, ((0, 0), (0, height - rows)))
        near = words[start // height % len(words)]
        return work(slice(start, start + rows), distances.hamming(whole, near, len(database)))

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
