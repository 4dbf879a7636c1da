"""What there is to encode: photos of a folder or a list, or rows of a file of features, each read when it is due."""

import contextlib
import dataclasses
import errno
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Shaped

from cib_jax.data import feature_files, photo_folder, photos
from cib_jax.data.dataset import Item
from cib_jax.errors import DataError
from cib_jax.files import map_in_order, printable

# What the system answers where the file itself is not to blame: codes made without it would lack good photos for ever.
_OF_THE_SYSTEM = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EIO,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
    }
)


LISTS = (".csv", ".parquet")
"""Extensions of lists of photos."""


class Read(NamedTuple):
    """What came of one item."""

    content: Item | None
    reason: str = ""
    """Why there is no content."""
    size: int | None = None
    """Of the file, in bytes, where the item is one."""
    modified_ns: int | None = None
    """When the file was last changed, in nanoseconds since 1970."""
    seen: photos.Seen | None = None
    """The photo as people see it, where that was asked for."""
    may_pass: bool = False
    """Whether the reason may be gone another time though the file stays as it is, such as a missing permission."""


class Items(Protocol):
    """Named items in a fixed order."""

    words: str
    """What they are, in the plural."""

    @property
    def names(self) -> Sequence[str]:
        """Of all, in order."""

    @property
    def place(self) -> str:
        """Where they lie, absolute."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should be told of how they were found, a sentence each."""

    def read(self, ranges: Iterable[range]) -> Iterator[tuple[int, Read]]:
        """Yields (number, what came of it) of the items that `ranges` name, in order, a few read ahead."""


@dataclasses.dataclass(frozen=True)
class Photos:
    """Photos, decoded to squares on all cores."""

    place: str
    """The folder, or the list, that they were asked for by."""
    names: Sequence[str]
    """Their paths, relative to `root` or absolute."""
    root: str
    size: int
    """Side of the squares in pixels."""
    max_megapixels: int = photos.MAX_MEGAPIXELS
    notes: Sequence[str] = ()
    closed: Sequence[str] = ()
    """Folders under `root` that cannot be entered: what is in them may be there nevertheless."""
    see: bool = False
    """Whether thumbnails are made, too."""
    words = "photos"

    def read(self, ranges: Iterable[Iterable[int]]) -> Iterator[tuple[int, Read]]:
        """Yields (number, photo or why there is none), in order, some photos being decoded ahead.

        Raises:
          DataError: they cannot be reached any more, which is no photo's own fault.
        """
        return map_in_order(self._read, itertools.chain.from_iterable(ranges))

    def _read(self, number: int) -> Read:
        path = os.path.join(self.root, self.names[number])
        size = modified = None
        try:
            found = os.stat(path)
            size, modified = found.st_size, found.st_mtime_ns
            if self.see:
                seen = photos.see(path, self.size, max_megapixels=self.max_megapixels)
                return Read(seen.square, "", size, modified, seen)
            return Read(photos.decode(path, self.size, max_megapixels=self.max_megapixels), "", size, modified)
        except OSError as error:
            self._check_system(error, path)
            return Read(None, (error.strerror or str(error)).lower(), size, modified, may_pass=True)
        except photos.BadPhotoError as error:
            cause = error.__cause__
            self._check_system(cause, path)
            # Pillow's own errors about a file's content have no number.
            passing = isinstance(error, photos.TooLargeError) or (isinstance(cause, OSError) and bool(cause.errno))
            return Read(None, printable(str(error)), size, modified, may_pass=passing)

    def _check_system(self, error: BaseException | None, path: str) -> None:
        # A file of its own may go; one that goes with its whole folder was on a disk that did.
        gone = next((at for at in (self.root, os.path.dirname(path)) if not _holds_something(at)), None)
        if isinstance(error, FileNotFoundError) and gone:
            raise DataError(
                f"--images: {printable(gone)} is gone or empty; mount it again, and the same command goes on, or name "
                "the photos that are still there in a list"
            )
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM):
            told = getattr(error, "strerror", None) or "out of memory"
            raise DataError(
                f"--images: {printable(path)} cannot be read now ({told.lower()}), which is not the photo's own "
                "fault; mend that, and the same command goes on"
            )


def _holds_something(root: str) -> bool:
    try:
        with os.scandir(root) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a file of features, which is mapped."""

    place: str
    names: Sequence[str]
    """Their ids, or their numbers where they have none."""
    features: Shaped[np.ndarray, "items ..."]
    notes: Sequence[str] = ()
    words = "vectors"

    def read(self, ranges: Iterable[range]) -> Iterator[tuple[int, Read]]:
        """Yields (number, row or why it cannot be used), in order."""
        for numbers in ranges:
            for start in range(numbers.start, numbers.stop, feature_files.BLOCK):
                block = np.asarray(self.features[start : min(start + feature_files.BLOCK, numbers.stop)])
                finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
                for row, good in enumerate(finite):
                    yield start + row, Read(block[row]) if good else Read(None, "values that are not finite")


def find(images: str, *, takes: str, size: int, max_megapixels: int = photos.MAX_MEGAPIXELS) -> Items:
    """Returns what `images` names: a folder of photos, a .csv or .parquet list of them, or a .npy of features.

    Photos come in the order of their paths, rows in that of the file.

    Args:
      images: the path.
      takes: "images" or "features": what the encoder was trained on.
      size: side of the photos' squares in pixels.
      max_megapixels: larger photos are unreadable.

    Raises:
      DataError: it is not there, holds nothing, or is something else than the encoder takes.
    """
    if not images:
        raise DataError("--images: it is empty; give a folder of photos, a list of them, or features")
    images = os.path.abspath(os.path.expanduser(images))
    if not os.path.exists(images):
        kinds = "features" if takes == "features" else "a folder of photos, or a list of them"
        raise DataError(f"--images: there is no {images}; give {kinds}")
    with asked_for_as("--images", instead="config.data.dir"):
        if takes == "features":
            if os.path.isdir(images):
                raise DataError(
                    f"--images: {images} is a folder, but the run was trained on features; give a .npy of the same kind"
                )
            features, ids = feature_files.mapped(images)
            if not len(features):
                raise DataError(f"--images: {images} holds no row; give features [items, {features.shape[-1]}]")
            return Rows(images, ids if ids is not None else [str(row) for row in range(len(features))], features)
        if os.path.isdir(images):
            return _of_folder(images, size, max_megapixels)
        if os.path.splitext(images)[1].lower() not in LISTS:
            raise DataError(f"--images: {images} is neither a folder nor a .csv or .parquet list; give one of these")
        return Photos(images, sorted(photo_folder.is_list_file(images)), os.path.dirname(images), size, max_megapixels)


def listed(place: str, names: Sequence[str], *, size: int, max_megapixels: int = photos.MAX_MEGAPIXELS) -> Photos:
    """Returns photos whose names are known already, of what `find` was given as `place`.

    Raises:
      DataError: their folder is not there any more.
    """
    root = place if os.path.isdir(place) else os.path.dirname(place)
    if not _holds_something(root):
        raise DataError(f"--images: {root} is gone or empty; mount it again, or say by --images where it is now")
    return Photos(place, names, root, size, max_megapixels)


def _of_folder(directory: str, size: int, max_megapixels: int) -> Photos:
    paths, others, closed = photo_folder.walk_folder(directory)
    if not paths:
        seen = photo_folder.counted(others) + photo_folder.heic_hint(others) if others else "nothing"
        why = f"{closed[0].path or directory}: {closed[0].reason}" if closed else seen
        raise DataError(
            f"--images: {directory} holds no photos ({printable(why)}); give a folder with files named "
            f"{', '.join(sorted(photos.EXTENSIONS))}"
        )
    notes = []
    if others:
        notes.append(f"Not photos by name, left out: {photo_folder.counted(others)}{photo_folder.heic_hint(others)}")
    if closed:
        notes.append(
            f"{len(closed):,} folders cannot be entered, what is in them is left out; the first: "
            f"{printable(closed[0].path)}: {closed[0].reason}"
        )
    inside = [folder.path for folder in closed]
    return Photos(directory, paths, directory, size, max_megapixels, notes, inside)


@contextlib.contextmanager
def asked_for_as(name: str, instead: str = "--images") -> Iterator[None]:
    """Names in errors what the user named: another flag or argument `instead` of that which it is known by here."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace(f"{instead}:", f"{name}:")) from error
