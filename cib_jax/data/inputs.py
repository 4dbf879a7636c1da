"""Inputs of encoding: photos of a folder or a list, or rows of a feature file, read as they are needed."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from cib_jax.data import feature_files, photo_folder, photos
from cib_jax.data.dataset import Item, Unreadable, data_error
from cib_jax.errors import DataError
from cib_jax.files import map_in_order, modified_ns, printable, short_reason

LISTS = (".csv", ".parquet")
"""Extensions of lists of photos."""

# Errors of the system rather than of a file: skipping the file would drop a good photo from the codes for good.
_SYSTEM_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}
_SYSTEM_ERRORS |= {errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH}

# Reasons that settings or installed packages decide.
_TRANSIENT = (photos.TooLargeError, photos.TruncatedPhotoError, photos.MissingReaderError)

_error = functools.partial(data_error, "--images")


class Read(NamedTuple):
    """Content of one item, or the reason why it has none, with the size and time of its file.

    `decoded` is the photo with its thumbnail, if thumbnails were requested. `transient` says whether the reason may
    disappear while the file stays as it is, such as a missing permission.
    """

    content: Item | None
    reason: str = ""
    size: int | None = None
    modified_ns: int | None = None
    decoded: photos.DecodedPhoto | None = None
    transient: bool = False


@dataclasses.dataclass(frozen=True)
class Photos:
    """Photos, decoded to squares on all cores, with thumbnails if requested.

    `place` is the folder or list that the user named, and `root` the folder of the relative paths in `names`. The
    folders `closed` under it cannot be read; photos inside them may exist nevertheless. Photos that are `known`,
    by name, were read before, and are read again only if their files have changed. With a list `truncated`, JPEGs that
    lack their last bytes are decoded as far as they go, and their names are appended to it, perhaps twice.
    """

    place: str
    names: Sequence[str]
    root: str
    size: int
    max_megapixels: int = photos.MAX_MEGAPIXELS
    notes: Sequence[str] = ()
    closed: Sequence[Unreadable] = ()
    thumbnails: bool = False
    known: Mapping[str, Read] = dataclasses.field(default_factory=dict)
    truncated: list[str] | None = None
    noun = "photo"

    def read(self, ranges: Iterable[Iterable[int]]) -> Iterator[tuple[int, Read]]:
        """Yields (number, photo or reason), in order; raises if the reason is outside the files."""
        return map_in_order(self._read, itertools.chain.from_iterable(ranges))

    def _read(self, number: int) -> Read:
        path = os.path.join(self.root, self.names[number])
        size = modified = None
        try:
            status = os.stat(path)
            size, modified = status.st_size, modified_ns(status)
            known = self.known.get(self.names[number])
            if known is not None and (known.size, known.modified_ns) == (size, modified):
                return known
            options: dict[str, Any] = {"max_megapixels": self.max_megapixels}
            if self.truncated is not None:
                options["on_truncated"] = functools.partial(self.truncated.append, self.names[number])
            if not self.thumbnails:
                return Read(photos.decode(path, self.size, **options), "", size, modified)
            decoded = photos.decode_with_thumbnail(path, self.size, **options)
            return Read(decoded.square, "", size, modified, decoded)
        except photos.BadPhotoError as error:
            cause = error.__cause__
            self._raise_system_error(cause, path)
            # Errors that Pillow raises about the content of a file have no number.
            transient = isinstance(error, _TRANSIENT) or (isinstance(cause, OSError) and bool(cause.errno))
            return Read(None, printable(str(error)), size, modified, transient=transient)
        except (OSError, ValueError) as error:  # ValueError: a list may name what no file can be called
            self._raise_system_error(error, path)
            return Read(None, short_reason(error), size, modified, transient=True)

    def _raise_system_error(self, error: BaseException | None, path: str) -> None:
        # A single file may disappear; if its whole folder did, a disk was unmounted.
        gone = next((folder for folder in (self.root, os.path.dirname(path)) if _is_missing_or_empty(folder)), None)
        if isinstance(error, FileNotFoundError) and gone:
            raise _error(f"{printable(gone)} is missing or empty; mount its disk and try again, or list other photos")
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS):
            reason = short_reason(error) if isinstance(error, OSError) else "out of memory"
            raise _error(f"{printable(path)} cannot be read now ({reason}), through no error in it; try again later")


def _is_missing_or_empty(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a mapped feature file, named by their ids, or by their numbers if they have none."""

    place: str
    names: Sequence[str]
    features: Shaped[np.ndarray, "items ..."]
    notes: Sequence[str] = ()
    noun = "vector"

    def read(self, ranges: Iterable[range]) -> Iterator[tuple[int, Read]]:
        """Yields (number, row or reason), in order."""
        for numbers in ranges:
            for start in range(numbers.start, numbers.stop, feature_files.BLOCK):
                block = np.asarray(self.features[start : min(start + feature_files.BLOCK, numbers.stop)])
                finite = np.isfinite(feature_files.as_float32(block)).reshape(len(block), -1).all(axis=1)
                for row, good in enumerate(finite):
                    yield start + row, Read(block[row]) if good else Read(None, "values that are not finite")


Items = Photos | Rows
"""Named items in a fixed order; `noun` is their kind, and `place` the path that the user gave."""


def load_inputs(
    images: str,
    *,
    takes: str,
    size: int,
    max_megapixels: int = photos.MAX_MEGAPIXELS,
    exclude: Sequence[str] = (),
) -> Items:
    """Returns the items of a folder of photos, a .csv or .parquet list of photos, or a feature file.

    Photos come in the order of their paths, rows in the order of the file. An encoder takes "images" or "features".
    Photos that a pattern in `exclude` matches, or one of whose folders it matches, are left out.
    """
    if not images:
        raise _error("it must be a folder of photos, a list of them, or a feature file, got ''")
    images = os.path.abspath(os.path.expanduser(images))
    if not os.path.exists(images):
        kinds = "a feature file" if takes == "features" else "a folder of photos, or a list of them"
        raise _error(f"{images} does not exist; give {kinds}")
    with blame_field("--images", instead_of="config.data.dir"):
        if takes == "features":
            if exclude:
                raise DataError(f"--exclude must be left out for features, got {exclude[0]!r}", field="--exclude")
            if os.path.isdir(images):
                raise _error(f"{images} must be a .npy file like the one the run was trained on, got a folder")
            features, ids = feature_files.map_features(images)
            if not len(features):
                raise _error(f"{images} holds no row; give features [items, {features.shape[-1]}]")
            return Rows(images, ids if ids is not None else [str(row) for row in range(len(features))], features)
        if not os.path.isdir(images):
            if not images.lower().endswith(LISTS):
                raise _error(f"{images} must be a folder, or a .csv or .parquet list of photos")
            listed = sorted(photo_folder.read_list_paths(images))
            paths = [path for path in listed if not photo_folder.is_inside_excluded(path, exclude)]
            if not paths:
                raise _error(f"{images} lists no photo that --exclude={','.join(exclude)} leaves; give fewer patterns")
            return Photos(images, paths, os.path.dirname(images), size, max_megapixels)
        found = photo_folder.walk_folder(images, exclude)
        if not found.paths:
            first = str(found.closed[0]) if found.closed else ""
            raise _error(photo_folder.no_photos(images, found.others, first))
        return Photos(images, found.paths, images, size, max_megapixels, found.notes(), found.closed)


def load_listed_photos(
    place: str, names: Sequence[str], *, size: int, max_megapixels: int = photos.MAX_MEGAPIXELS
) -> Photos:
    """Returns photos of which the names are already known from an earlier `load_inputs(place)`."""
    is_list = place.lower().endswith(LISTS) and not os.path.isdir(place)
    root = os.path.dirname(place) if is_list else place
    if _is_missing_or_empty(root):
        raise _error(f"{root} is missing or empty; mount its disk, or give its new path with --images")
    return Photos(place, names, root, size, max_megapixels)


@contextlib.contextmanager
def blame_field(name: str, instead_of: str = "--images") -> Iterator[None]:
    """Replaces the field that data errors name, `instead_of`, by the flag or argument that the user gave."""
    try:
        yield
    except DataError as error:
        field = name if error.field == instead_of else error.field
        raise DataError(str(error).replace(f"{instead_of}:", f"{name}:"), field=field) from error
