"""A file that is there whole or not at all, whatever ends the process that writes it."""

import collections
import concurrent.futures
import contextlib
import os
import pathlib
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# atomic: A file that is there whole or not at all, whatever ends the process that writes it.


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path of this call's own, whose file takes the place of `path` when the context ends without an error.

    Raises:
      OSError: it cannot be written; what lay at `path` is still there.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # where a disk over a network tells that it is full
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# data.names: Names of files as text: they are bytes, which need not be valid Unicode.


def printable(name: str) -> str:
    """Returns a name, or words with one, as valid Unicode: a byte that is none of it is written as `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()


# data.all_cores: A function of many items on all cores, its results in order.


def map_in_order(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
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
