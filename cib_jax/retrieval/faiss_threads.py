"""FAISS, imported when it is used, and the threads in which it works: each call on one core, many calls at once.

FAISS spreads one call over all cores by OpenMP, whose threads wait for each other by spinning: beside other work, a
query that takes 1 ms took 70 so. Here each call stays in its thread, and the threads share queries or, where there are
few, parts of the database.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TypeVar

from cib_jax.errors import Refusal

T = TypeVar("T")


class SearchError(Refusal):
    """An index cannot be made or asked as it was told to."""


def load() -> ModuleType:
    """Returns the module `faiss`.

    Raises:
      SearchError: it is not installed.
    """
    if importlib.util.find_spec("faiss") is None:
        raise SearchError("Index: searching wants a package more, FAISS; pip install 'cib-jax[search]'")
    import faiss

    return faiss


def cores() -> int:
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
    faiss = load()
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
    return ThreadPoolExecutor(cores(), "search", initializer=lambda: load().omp_set_num_threads(1))
