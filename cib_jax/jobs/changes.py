"""What came, changed or went among photos, by their files' sizes and times."""

import os
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from cib_jax.photo_table import State


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


def size_and_time(path: str) -> tuple[int, int]:
    """Returns a file's size in bytes and time of change in nanoseconds since 1970; -1 and -1: it is not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # the second where a list names what no file can be called
        return -1, -1
    return found.st_size, found.st_mtime_ns
