"""A function of many items on all cores, its results in order."""

import collections
import concurrent.futures
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def in_order(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields (item, function(item)) in order, computed on all cores, with a few results ahead of what is taken."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: collections.deque[tuple[Any, concurrent.futures.Future[Any]]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        # Of EXIF, palettes and large images; what matters of them is told as a photo's reason.
        warnings.simplefilter("ignore")
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > 4 * threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
