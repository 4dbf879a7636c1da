"""What an index keeps of one photo, and how that stands in an Arrow table."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from cib_jax.data.names import printable

# By it LanceDB sees that two writers add the same photo.
_KEY = {"lance-schema:unenforced-primary-key": "true"}


class Row(NamedTuple):
    """A photo, or a file that is none."""

    path: str
    """Relative to the root, or absolute."""
    size: int
    """In bytes; −1: it may become readable without being changed."""
    modified_ns: int
    """Time of the last change in nanoseconds since 1970; −1: the same."""
    code: bytes | None = None
    """Packed; None: it cannot be read."""
    width: int = 0
    height: int = 0
    thumbnail: bytes = b""
    reason: str = ""
    """Why it cannot be read."""


def key_of(path: str) -> int:
    """Returns the key of a path: eight bytes of its digest, as a signed number."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big", signed=True)


def path_of(row: dict[str, Any]) -> str:
    """Returns the path of a row with the columns path and raw_path."""
    return row["path"] if row["raw_path"] is None else os.fsdecode(row["raw_path"])


def content(rows: Sequence[Row], bits: int) -> Any:
    """Returns photos as an Arrow table."""
    import pyarrow

    codes = [None if row.code is None else list(row.code) for row in rows]
    valid = [_is_unicode(row.path) for row in rows]
    paths = [row.path for row in rows]
    return pyarrow.table(
        {
            "key": [key_of(path) for path in paths],
            "path": [printable(path) for path in paths],
            "raw_path": [None if good else os.fsencode(path) for good, path in zip(valid, paths, strict=True)],
            "code": codes,
            "size": [row.size for row in rows],
            "modified": pyarrow.array([row.modified_ns for row in rows], pyarrow.int64()).cast(_time()),
            "width": [row.width for row in rows],
            "height": [row.height for row in rows],
            "thumbnail": [row.thumbnail for row in rows],
            "reason": [row.reason or None for row in rows],
        },
        schema=schema(bits),
    )


def schema(bits: int) -> Any:
    """Returns the Arrow schema of photos with codes of this length."""
    import pyarrow

    return pyarrow.schema(
        [
            pyarrow.field("key", pyarrow.int64(), nullable=False, metadata=_KEY),
            pyarrow.field("path", pyarrow.string()),
            # Where it is no valid Unicode, as the names of files may be.
            pyarrow.field("raw_path", pyarrow.binary()),
            # As LanceDB's own search by Hamming distance wants it.
            pyarrow.field("code", pyarrow.list_(pyarrow.uint8(), bits // 8)),
            pyarrow.field("size", pyarrow.int64()),
            pyarrow.field("modified", _time()),
            pyarrow.field("width", pyarrow.int32()),
            pyarrow.field("height", pyarrow.int32()),
            pyarrow.field("thumbnail", pyarrow.binary()),
            pyarrow.field("reason", pyarrow.string()),
        ]
    )


def _time() -> Any:
    import pyarrow

    return pyarrow.timestamp("ns", "UTC")


def _is_unicode(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
