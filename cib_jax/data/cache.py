"""Computed features on disk: one file per part, in a folder named by the hash of all that shaped them."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Shaped, UInt8

from cib_jax.data.dataset import Bar

# jobs.feature_cache: Computed features on disk: one file per part, in a folder named by the hash of all that shaped them.

MADE_OF = "made_of.json"


class DamagedError(ValueError):
    """A part is there, but cannot be trusted; the message says what is wrong with it."""


def home() -> pathlib.Path:
    """Returns the folder in which this user's caches of cib_jax lie."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "cib_jax"


class FeatureCache:
    """The features that one set of images, one network and one way of looking give.

    Whatever else they depend on belongs into `made_of`: a change in it makes another folder, so that nothing stale is
    ever read. A part is written whole or not at all, and read with its checksum; several processes may share a folder.
    """

    def __init__(self, root: pathlib.Path, made_of: Mapping[str, Any]):
        """Names the folder under `root`; nothing is written yet. `made_of` must be plain JSON."""
        self._made_of = json.dumps(made_of, sort_keys=True, indent=2)
        self.folder = root / hashlib.sha256(self._made_of.encode()).hexdigest()[:24]

    def read(self, part: str, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> Shaped[np.ndarray, "..."] | None:
        """Returns the part called `part`, or None if it was never written.

        Raises:
          DamagedError: the file is cut short, altered or holds something else.
          OSError: the folder cannot be looked into.
        """
        path = self._path(part)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="np") as file:
                features, checksum = file.get_tensor("features"), (file.metadata() or {}).get("checksum", "")
        except (OSError, safetensors.SafetensorError) as error:
            raise DamagedError(f"{path} is damaged ({error})") from error
        if features.shape != shape or features.dtype != dtype or _checksum(features) != checksum:
            raise DamagedError(f"{path} is damaged (its checksum is not that of its content)")
        with contextlib.suppress(OSError):  # someone else's cache, which may be read but not written to
            os.utime(self.folder)  # `prune` goes by it
        return features

    def write(self, part: str, features: Shaped[np.ndarray, "..."]) -> None:
        """Keeps a part, atomically.

        Raises:
          OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        made_of, path = self.folder / MADE_OF, self._path(part)
        own = f".{secrets.token_hex(4)}.part"
        if not made_of.exists():
            made_of.with_suffix(own).write_text(self._made_of, encoding="utf-8")
            os.replace(made_of.with_suffix(own), made_of)
        features = np.ascontiguousarray(features)
        try:
            safetensors.numpy.save_file(
                {"features": features}, path.with_suffix(own), {"checksum": _checksum(features)}
            )
            os.replace(path.with_suffix(own), path)
        except safetensors.SafetensorError as error:  # its way to say that the disk is full
            raise OSError(0, str(error), str(path)) from error
        finally:
            path.with_suffix(own).unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process computes for this folder, and keeps others waiting while the context lasts.

        So that of several processes that want the same features one computes them and the others read. Where the
        folder cannot be locked, nobody waits.
        """
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(self.folder.with_suffix(".lock").open("a"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def prune(self, most_bytes: int) -> None:
        """Deletes the folders beside this one that were not used for longest, until all take `most_bytes` or less."""
        prune(self.folder.parent, most_bytes, lambda folder: folder == self.folder)

    def _path(self, part: str) -> pathlib.Path:
        return self.folder / f"{part}.safetensors"


def prune(root: pathlib.Path, most_bytes: int, stays: Callable[[pathlib.Path], bool]) -> None:
    """Deletes the caches in `root` that were not used for longest, until all take `most_bytes` or less.

    Args:
      root: the folder of caches, each a folder with a file `MADE_OF`; nothing else is touched.
      most_bytes: that they may take.
      stays: says of a folder that it is in use.
    """
    if not root.is_dir():
        return
    used, sizes = {}, {}
    for folder in root.iterdir():
        with contextlib.suppress(OSError):  # another process may be deleting it
            if (folder / MADE_OF).exists():
                used[folder] = folder.stat().st_mtime
                sizes[folder] = sum(file.stat().st_size for file in folder.iterdir())
    total = sum(sizes.values())
    for folder in sorted(sizes, key=used.__getitem__):
        if total > most_bytes and not stays(folder):
            shutil.rmtree(folder, ignore_errors=True)
            total -= sizes[folder]


def _checksum(features: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(features).data, digest_size=16).hexdigest()


def digest_of_images(batches: Iterable[UInt8[np.ndarray, "rows height width 3"]]) -> str:
    """Returns a digest of images, of their sizes and of their order, however they are cut into batches."""
    digest, shape = hashlib.blake2b(digest_size=16), None
    for images in batches:
        if images.shape[1:] != shape:
            shape = images.shape[1:]
            digest.update(repr(shape).encode())
        digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


# data.holding: Who works in a folder of prepared photos, and who looks at it: nothing is tidied away under one who looks.


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
