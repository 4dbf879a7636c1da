"""Arrow columns that an index and a corpus share: path, size, time of change and reason of each file."""

import os
from collections.abc import Sequence
from typing import Any

from cib_jax.files import printable


def file_columns(
    paths: Sequence[str], sizes: Sequence[int | None], times: Sequence[int | None], reasons: Sequence[str]
) -> dict[str, Any]:
    """Returns the columns of files, by name, from paths as `os.fsdecode` gives them and nanoseconds since 1970.

    - `path`: The path as text, with bytes that are not valid Unicode written as `\\udcff`.
    - `raw_path`: The bytes of a path that is not valid Unicode; otherwise null.
    - `size`: The size in bytes.
    - `modified`: The time of the last change.
    - `reason`: Why the file has no code; null if it has one, given as "".
    """
    import pyarrow

    texts = [printable(path) for path in paths]
    raw = [None if text == path else os.fsencode(path) for text, path in zip(texts, paths, strict=True)]
    return {
        "path": pyarrow.array(texts, pyarrow.string()),
        "raw_path": pyarrow.array(raw, pyarrow.binary()),
        "size": pyarrow.array(sizes, pyarrow.int64()),
        "modified": pyarrow.array(times, pyarrow.int64()).cast(timestamp()),
        "reason": pyarrow.array([reason or None for reason in reasons], pyarrow.string()),
    }


def timestamp() -> Any:
    """Returns the Arrow type of the column `modified`."""
    import pyarrow

    return pyarrow.timestamp("ns", "UTC")


def path_of(row: dict[str, Any]) -> str:
    """Returns the path of a row with the columns `path` and `raw_path`."""
    # As this process names files: where its locale is not UTF-8, that is not the text.
    return os.fsdecode(row["path"].encode() if row["raw_path"] is None else row["raw_path"])
