"""The file of an indexed photo, if it is still the one that was indexed."""

import os
import stat

from cib_jax.web.answers import Photo


class ChangedError(Exception):
    """The file is not there, or is not what was indexed; the message is a sentence without its path."""


def read(root: str, photo: Photo, most: int) -> bytes:
    """Returns the content of a photo's file.

    It is opened first and judged by what was opened, so that nothing put in its place meanwhile is read: it must be a
    regular file inside the folder of the photos, whatever links lead there, of the size and time that were indexed. One
    that a list named elsewhere must be in the folder that it was named in.

    Args:
      root: the folder of the photos.
      photo: as the index knows it.
      most: bytes.

    Raises:
      ChangedError: it is not there, lies elsewhere, was changed since it was indexed, or is larger than `most`.
    """
    path = os.path.join(root, photo.path)
    try:
        # A named pipe would else wait for someone to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError):
        raise ChangedError("The photo's file cannot be read: it was changed since it was indexed.") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or not _inside(root, path, found):
            raise ChangedError("The photo's file was changed since it was indexed: it is now somewhere else.")
        if (found.st_size, found.st_mtime_ns) != (photo.size, photo.modified_ns):
            raise ChangedError("The photo's file was changed since it was indexed; index the photos again.")
        if found.st_size > most:
            raise ChangedError(f"The photo's file is larger than {most // 1_000_000} MB, so it is not shown.")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(found.st_size)
    except OSError:
        raise ChangedError("The photo's file cannot be read now.") from None
    finally:
        os.close(descriptor)


def _inside(root: str, path: str, found: os.stat_result) -> bool:
    """Returns whether what was opened is the file that `path`, without any link, names inside `root` now."""
    if not os.path.abspath(path).startswith(os.path.join(os.path.abspath(root), "")):
        root = os.path.dirname(path)
    try:
        real, folder = os.path.realpath(path, strict=True), os.path.realpath(root, strict=True)
        there = os.stat(real, follow_symlinks=False)
        return os.path.commonpath([real, folder]) == folder and os.path.samestat(there, found)
    except (OSError, ValueError):
        return False
