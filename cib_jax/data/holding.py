"""Who works in a folder of prepared photos, and who looks at it: nothing is tidied away under one who looks."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator
from typing import IO

from cib_jax.data.images import Bar


def in_use(folder: pathlib.Path) -> bool:
    """Returns whether somebody, in this process or another, looks at the photos that are kept in `folder`."""
    try:
        hold(folder, fcntl.LOCK_EX | fcntl.LOCK_NB).close()
    except OSError:
        return True
    return False


def hold(folder: pathlib.Path, how: int) -> IO[str]:
    """Returns a file that holds the folder until it is closed."""
    file = (folder / "used").open("w")
    try:
        fcntl.flock(file, how)
    except OSError:
        file.close()
        raise
    return file


@contextlib.contextmanager
def alone(folder: pathlib.Path, bar: Bar) -> Iterator[None]:
    """Keeps other processes that prepare photos out of `folder` while it lasts; waits for one that is there already."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with bar("Waiting for another process that prepares the same photos", 1) as moved:
                fcntl.flock(lock, fcntl.LOCK_EX)
                moved(1)
        yield
