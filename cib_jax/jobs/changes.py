"""What came, changed or went among photos, by their files' sizes and times."""

import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from cib_jax.collection.photo_rows import key_of
from cib_jax.collection.photo_table import PhotoTable, State
from cib_jax.data.all_cores import in_order
from cib_jax.data.items import Photos

ABSENT, UNTOLD = -1, -2
"""In place of a size: the file is not there; the system does not say whether it is, as in a folder that is closed."""

_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


class Changes(NamedTuple):
    """What is to be done."""

    missing: list[int]
    """Files of which nothing is known."""
    changed: list[int]
    """Files that have another size or time than they had."""
    again: list[int]
    """Files that could not be read, which may have passed."""
    gone: list[int]
    """Keys of files that are not there any more."""
    absent: list[int]
    """Files that are listed, but not there."""
    untold: list[int]
    """Files that are listed, of which it cannot be told now whether they are there; what is known of them is kept."""


def compared(
    state: State,
    keys: Int64[np.ndarray, " files"],
    sizes: Int64[np.ndarray, " files"],
    modified: Int64[np.ndarray, " files"],
) -> tuple[Bool[np.ndarray, " files"], Bool[np.ndarray, " files"]]:
    """Returns which files are known, and which of them are as they were."""
    if not len(state.keys):
        return np.zeros(len(keys), bool), np.zeros(len(keys), bool)
    places = np.minimum(np.searchsorted(state.keys, keys), len(state.keys) - 1)
    known = state.keys[places] == keys
    return known, known & (state.sizes[places] == sizes) & (state.modified_ns[places] == modified)


def changes(
    table: PhotoTable,
    before: Int64[np.ndarray, " known"],
    found: Photos,
    keys: Int64[np.ndarray, " files"],
    sizes: Int64[np.ndarray, " files"],
    modified: Int64[np.ndarray, " files"],
) -> Changes:
    """Returns what is to be done to bring a table in step with files.

    Args:
      table: the index.
      before: keys that it held before the files were looked for. What another process has indexed since may have come
        since, too, so it is not gone for not being among them.
      found: the files.
      keys: of them.
      sizes: as `look` tells them.
      modified: the same.
    """
    state = table.state()
    known, same = compared(state, keys, sizes, modified)
    there = sizes >= 0
    listed = np.isin(before, keys[sizes != ABSENT])
    gone = before[~listed & np.isin(before, state.keys)].tolist()
    if found.closed:
        # What is in a folder that cannot be entered now may be there tomorrow.
        closed = tuple(f"{folder}/" for folder in found.closed)
        gone = [key_of(path) for path in table.paths(gone) if not path.startswith(closed)]
    again = np.isin(keys, state.keys[state.sizes < 0])
    which = (there & ~known, there & known & ~same & ~again, there & again, sizes == ABSENT, sizes == UNTOLD)
    missing, changed, tried, absent, untold = (np.flatnonzero(some).tolist() for some in which)
    return Changes(missing, changed, tried, gone, absent, untold)


def look(root: str, names: Sequence[str]) -> tuple[Int64[np.ndarray, " files"], Int64[np.ndarray, " files"]]:
    """Returns size and time of change of every file, `ABSENT` or `UNTOLD` where it has none."""
    sizes, modified = np.full((2, len(names)), ABSENT, np.int64)
    paths = [os.path.join(root, name) for name in names]
    chunks = [range(start, min(start + 1000, len(paths))) for start in range(0, len(paths), 1000)]

    def of_some(numbers: range) -> list[tuple[int, int]]:
        return [size_and_time(paths[number]) for number in numbers]

    for numbers, pairs in in_order(of_some, chunks):
        sizes[numbers.start : numbers.stop], modified[numbers.start : numbers.stop] = np.array(pairs).T
    return sizes, modified


def size_and_time(path: str) -> tuple[int, int]:
    """Returns a file's size in bytes and time of change in nanoseconds since 1970; `ABSENT` or `UNTOLD` twice."""
    try:
        found = os.stat(path)
    except OSError as error:
        return (ABSENT, ABSENT) if error.errno in _NOT_THERE else (UNTOLD, UNTOLD)
    except ValueError:  # a list may name what no file can be called
        return ABSENT, ABSENT
    return found.st_size, found.st_mtime_ns
