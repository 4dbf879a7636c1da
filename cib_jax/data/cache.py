"""Disk caches: folders named by the hash of their key, with atomic files, reader/writer locks and pruning.

The caches of features, of prepared photos and of copied Parquet files use it. A cache folder holds a file `KEY_FILE`
with everything that its content depends on, so that a change in any of it leads to another folder.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Shaped, UInt8

from cib_jax.data.dataset import Bar, data_error, no_bar
from cib_jax.errors import DataError
from cib_jax.files import locked, replacing, short_reason, write_bytes

KEY_FILE = "made_of.json"


class DamagedError(ValueError):
    """A part of the feature cache exists but is not intact; the message says what is wrong with it."""


# Folders


def home() -> pathlib.Path:
    """Returns the folder of this user's caches."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "cib_jax"


def key_folder(root: pathlib.Path, key: Mapping[str, Any]) -> pathlib.Path:
    """Returns the cache folder under `root` for a key of plain JSON; nothing is written."""
    return root / hashlib.sha256(_key_text(key)).hexdigest()[:24]


def create_folder(root: pathlib.Path, key: Mapping[str, Any]) -> pathlib.Path:
    """Creates the cache folder under `root` for a key, if needed, and returns it."""
    folder = key_folder(root, key)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / KEY_FILE).exists():
        write_bytes(folder / KEY_FILE, _key_text(key))
    return folder


def _key_text(key: Mapping[str, Any]) -> bytes:
    return json.dumps(key, sort_keys=True, indent=2).encode()


def remove_oldest_files(folder: pathlib.Path, max_bytes: int) -> None:
    """Deletes the files of a folder that were written first until all take `max_bytes`."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process has deleted it
            files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= max_bytes:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def prune(root: pathlib.Path, max_bytes: int, keep: Callable[[pathlib.Path], bool]) -> None:
    """Deletes the least recently used cache folders in `root`, except those to keep, until all take `max_bytes`."""
    folders = []
    for file in root.glob(f"*/{KEY_FILE}"):
        with contextlib.suppress(OSError):  # another process may be deleting the folder
            size = sum(file.stat().st_size for file in file.parent.iterdir())
            folders.append((file.parent.stat().st_mtime, file.parent, size))
    total = sum(size for *_, size in folders)
    for _, folder, size in sorted(folders):
        if total > max_bytes and not keep(folder):
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


def mark_used(folder: pathlib.Path) -> None:
    """Sets the time by which `prune` finds the least recently used folder."""
    with contextlib.suppress(OSError):  # a shared cache may be readable but not writable
        os.utime(folder)


@contextlib.contextmanager
def write_errors(folder: pathlib.Path, content: str) -> Iterator[None]:
    """Turns an OSError of writing `content` to a cache folder into a DataError that names the cache's field."""
    try:
        yield
    except OSError as error:
        raise _error(f"{content} cannot be written to {folder} ({short_reason(error)}); free some space") from error


def validate_free_space(folder: pathlib.Path, needed: int, content: str, remedy: str) -> None:
    """Checks that the disk of `folder` has `needed` bytes free for `content`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise _error(f"{content} need {needed / 2**30:.1f} GiB, but {folder} has {free / 2**30:.1f} free; {remedy}")


def _error(problem: str) -> DataError:
    return data_error("config.cache.dir", f"{problem}, or choose another place with --config.cache.dir=DIR")


# Locks


@contextlib.contextmanager
def exclusive(folder: pathlib.Path, bar: Bar = no_bar) -> Iterator[None]:
    """Holds the writer lock of a cache folder; shows a bar while it waits for another writer. Readers may go on."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "lock", wait=False))
        except BlockingIOError:
            with bar("Waiting for another process that prepares the same data", 1) as advance:
                stack.enter_context(locked(folder / "lock"))
                advance(1)
        yield


def shared(folder: pathlib.Path) -> contextlib.AbstractContextManager[object]:
    """Holds the reader lock of a cache folder."""
    return locked(folder / "used", shared=True)


def in_use(folder: pathlib.Path) -> bool:
    """Returns whether a reader, in this process or another, holds the reader lock of a cache folder."""
    try:
        with locked(folder / "used", wait=False):
            return False
    except OSError:
        return True


# Features


class FeatureCache:
    """Features of one set of images by one network, one file per part, which several processes may share."""

    def __init__(self, root: pathlib.Path, key: Mapping[str, Any]):
        """Selects the folder under `root` for a key of plain JSON; nothing is written."""
        self._root, self._key = root, dict(key)
        self.folder = key_folder(root, key)

    def read(self, part: str, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> Shaped[np.ndarray, "..."] | None:
        """Returns the part called `part`, or None if it was never written; raises a DamagedError if it is damaged."""
        path = self.folder / f"{part}.safetensors"
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="np") as file:
                features, checksum = file.get_tensor("features"), (file.metadata() or {}).get("checksum", "")
        except (OSError, safetensors.SafetensorError) as error:
            raise DamagedError(f"{path} is damaged ({error})") from error
        if features.shape != shape or features.dtype != dtype or _checksum(features) != checksum:
            raise DamagedError(f"{path} is damaged (its checksum, shape or type is wrong)")
        mark_used(self.folder)
        return features

    def write(self, part: str, features: Shaped[np.ndarray, "..."]) -> None:
        """Writes a part atomically, or raises an OSError."""
        path = create_folder(self._root, self._key) / f"{part}.safetensors"
        features = np.ascontiguousarray(features)
        try:
            with replacing(path) as temporary:
                safetensors.numpy.save_file({"features": features}, temporary, {"checksum": _checksum(features)})
        except safetensors.SafetensorError as error:  # raised instead of an OSError if the disk is full
            raise OSError(0, str(error), str(path)) from error

    def has(self, part: str) -> bool:
        """Returns whether the part called `part` was written; it may be damaged."""
        return (self.folder / f"{part}.safetensors").exists()

    def in_turn(self, parts: Iterable[str]) -> Iterator[str]:
        """Yields each part once, last those that another process computes, and holds its lock until the next one.

        So several processes that need the same parts share the work, and read what the others have computed. If the
        folder cannot be locked, nobody waits.
        """
        busy: list[str] = []
        for wait, names in ((False, parts), (True, busy)):
            for part in names:
                with contextlib.ExitStack() as stack:
                    try:
                        folder = create_folder(self._root, self._key)
                        stack.enter_context(locked(folder / f"{part}.lock", wait=wait))
                    except BlockingIOError:
                        busy.append(part)
                        continue
                    except OSError:
                        pass
                    yield part

    def prune(self, max_bytes: int) -> None:
        """Deletes the least recently used folders beside this one until all take at most `max_bytes`."""
        prune(self._root, max_bytes, lambda folder: folder == self.folder)


def _checksum(features: np.ndarray) -> str:
    return hashlib.blake2b(features.data, digest_size=16).hexdigest()


def digest_of_images(batches: Iterable[UInt8[np.ndarray, "_ height width 3"]]) -> str:
    """Returns a digest of images, their sizes and their order that does not depend on the batch size."""
    digest, shape = hashlib.blake2b(digest_size=16), None
    for images in batches:
        if images.shape[1:] != shape:
            shape = images.shape[1:]
            digest.update(repr(shape).encode())
        digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()
