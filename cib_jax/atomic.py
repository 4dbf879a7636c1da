"""A file that is there whole or not at all, whatever ends the process that writes it."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


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
