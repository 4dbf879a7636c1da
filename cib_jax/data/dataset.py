"""Sets of images or feature vectors: random access, labels, subsets, and batches of uint8 images or of features."""

import csv
import dataclasses
import hashlib
import io
import math
import pathlib
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, SupportsIndex, runtime_checkable

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from cib_jax.data.photos import MAX_MEGAPIXELS
from cib_jax.errors import DataError
from cib_jax.files import path_as_utf8, printable, write_bytes
from cib_jax.random_streams import stream_rng

Item = UInt8[np.ndarray, "height width 3"] | Float[np.ndarray, "..."]
"""An image, or a feature vector in its place."""

Labels = Int[np.ndarray, " images"] | Bool[np.ndarray, "images classes"]
"""Class numbers, one for each image, or multi-hot rows for any number of classes per image."""

Batch = UInt8[np.ndarray, "batch height width 3"]

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Progress-bar factory: (description, total) → context manager that yields `advance(count)`."""

_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "'")

CLASS_SEPARATOR = "|"
"""Separator between the classes of one image where they are written as one text, as in a CSV file."""

UNREADABLE = "unreadable.csv"
"""Name of the file that lists the files that cannot be read, in the folder of a run or an index."""


def data_error(field: str, problem: str) -> DataError:
    """Returns an error, the message of which begins with the config field, flag or file to blame."""
    return DataError(f"{field}: {problem}", field=field)


def config_error(field: str, problem: str) -> DataError:
    """Returns an error about a field of `config.data`."""
    return data_error(f"config.data.{field}", problem)


def no_bar(description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Shows no progress bar."""
    del description, total
    return nullcontext(lambda count: None)


@runtime_checkable
class Images(Protocol):
    """Random access to decoded images, in a fixed order; an array of images satisfies it.

    A class may also define `resized(index, size)`, if it can decode straight to that size; `gather(indices)`, if
    many items are read faster together; and `identity`, a string that changes with the content, if that is known
    without reading the content.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images or feature vectors with their labels and names (such as their paths), if they have any.

    Labels measure and, in the published protocols, balance draws; nothing is fit to them.
    """

    images: Images
    labels: Labels | None
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Int[np.ndarray, " taken"]) -> "ImageSet":
        """Returns the images at `indices`, in that order, undecoded."""
        labels = None if self.labels is None else self.labels[indices]
        names = None if self.names is None else [self.names[int(index)] for index in indices]
        return ImageSet(_Subset(self.images, indices), labels, names)


class Unreadable(NamedTuple):
    """A file that could not be used, and the reason."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


def write_unreadable(path: pathlib.Path, files: Sequence[Unreadable]) -> None:
    """Writes files and reasons as a CSV file, or removes an earlier one if there are none.

    A cell that a spreadsheet would take for a formula, or that begins with an apostrophe, has an apostrophe in front.
    Paths that are not valid UTF-8 keep their bytes.
    """
    if not files:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    # In quotes, a cell stays one where spreadsheets expect semicolons between cells.
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(("path", "reason"))
    for file in files:
        cells = path_as_utf8(file.path), file.reason
        writer.writerow([f"'{cell}" if cell.startswith(_FORMULAS) else cell for cell in cells])
    write_bytes(path, text.getvalue().encode("utf-8", "surrogateescape"))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data set is loaded and how; the fields of `config.data` that concern loading.

    Attributes:
      name: Name of the data set: one of `sources.DATA_SETS`, "folder" (of photos), "list" (a CSV or Parquet file of
        paths), "features" (vectors of any model), "nuswide", "mscoco", or a data set of tensorflow-datasets (TFDS).
      directory: Folder, file or TFDS data_dir ("": the default of TFDS). Unused for "digits".
      labeled: Whether the labels of a folder, a list or features are used.
      stored_size: Side in pixels to which the photos of a folder or a list are resized.
      max_megapixels: Limit above which an image is left out.
      truncated: Whether JPEGs that lack their last bytes are decoded as far as they go; of a folder or a list.
      raw_directory: Folder of the published files, for a TFDS data set with files that TFDS cannot download.
      image_feature, label_feature: TFDS features, with slashes into nested ones; "" selects the only one.
      database_split: TFDS split to train on and search, such as "train[:1000]"; "" is "train".
      query_split: TFDS split of the queries; "" is "test", or none if "train" is the only split.
    """

    name: str
    directory: str = ""
    labeled: bool = True
    stored_size: int = 0
    max_megapixels: int = MAX_MEGAPIXELS
    truncated: bool = False
    raw_directory: str = ""
    image_feature: str = ""
    label_feature: str = ""
    database_split: str = ""
    query_split: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set as it is published, before its images are split by role.

    `train` holds all images if the set comes in one piece, `roles` the splits that a list of photos gives itself (by
    `splits.ROLES`), `unreadable` the files that were left out, and `notes` sentences for the user.
    """

    train: ImageSet
    test: ImageSet | None
    classes: Sequence[str] = ()
    roles: Mapping[str, ImageSet] | None = None
    unreadable: Sequence[Unreadable] = ()
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class _Subset:
    images: Images
    indices: Int[np.ndarray, " taken"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.images[int(self.indices[index])]

    def resized(self, index: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
        return resized(self.images, int(self.indices[index]), size)

    def gather(self, indices: Int[np.ndarray, " items"]) -> Shaped[np.ndarray, "items ..."]:
        return gather(self.images, self.indices[indices])

    @property
    def identity(self) -> str | None:
        whole = identity(self.images)
        taken = hashlib.blake2b(np.asarray(self.indices, np.int64).tobytes(), digest_size=16).hexdigest()
        return whole and f"{whole}/{taken}"


@dataclasses.dataclass(frozen=True)
class _Concatenation:
    parts: Sequence[Images]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _locate(self, index: int) -> tuple[Images, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)

    def __getitem__(self, index: int) -> Item:
        part, index = self._locate(int(index))
        return part[index]

    def resized(self, index: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
        return resized(*self._locate(int(index)), size)

    @property
    def identity(self) -> str | None:
        known = [identity(part) for part in self.parts]
        return None if None in known else "+".join(map(str, known))


def concatenate(*sets: ImageSet) -> ImageSet:
    """Returns one set after the other as one set; labels and names are kept if every set has them."""
    if len(sets) == 1:
        return sets[0]
    labels = [part.labels for part in sets if part.labels is not None]
    names = [part.names for part in sets if part.names is not None]
    return ImageSet(
        _Concatenation([part.images for part in sets]),
        np.concatenate(labels) if len(labels) == len(sets) else None,
        [name for part in names for name in part] if len(names) == len(sets) else None,
    )


def resized(images: Images, index: int, size: int) -> UInt8[np.ndarray, "height width 3"]:
    """Returns image `index` as a square, decoded straight to that size if the images support it."""
    if hasattr(images, "resized"):
        return images.resized(index, size)
    return resize(images[index], size)


def resize(image: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the image resized to a square on the host, bilinearly with antialiasing, by Pillow."""
    return np.asarray(PIL.Image.fromarray(image).resize((size, size), PIL.Image.Resampling.BILINEAR))


def gather(images: Images, indices: Int[np.ndarray, " items"]) -> Shaped[np.ndarray, "items ..."]:
    """Returns the items at `indices`, which have one shape, as one array."""
    if isinstance(images, np.ndarray):
        return images[indices]
    if hasattr(images, "gather"):
        return images.gather(indices)
    return np.stack([images[int(index)] for index in indices])


def identity(images: Images) -> str | None:
    """Returns a string that changes with the content of the images, or None if only reading them would show it."""
    return getattr(images, "identity", None)


# Labels


def multi_hot(rows: Sequence[Any], classes: int) -> Bool[np.ndarray, "images classes"]:
    """Returns multi-hot labels from the class numbers of each image."""
    labels = np.zeros((len(rows), classes), bool)
    for label, numbers in zip(labels, rows, strict=True):
        label[np.asarray(numbers, np.int64)] = True
    return labels


def is_missing(value: Any) -> bool:
    """Returns whether a cell has no value: None, an empty text, or NaN, which pandas writes for it, also as text."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ("", "nan", "NaN", "NULL")


def parse_labels(path: str, columns: Mapping[str, Sequence[Any]]) -> tuple[Labels | None, list[str]]:
    """Returns the labels in the columns of a table, or None, and the names of the classes; `path` is for messages.

    The column `label` holds one class per row, by number or name. `labels` holds lists of them, or text with
    `CLASS_SEPARATOR` between them, and may be empty. Spaces around a name do not belong to it.
    """
    if "label" in columns and "labels" in columns:
        raise config_error("dir", f"{path} has both columns 'label' and 'labels'; remove one of them")
    column = "labels" if "labels" in columns else "label"
    if column not in columns:
        return None, []
    values = columns[column]
    numbers_only = all(isinstance(value, int | float) and not is_missing(value) for value in values)
    several = column == "labels" and not numbers_only
    rows = [_class_names(path, row, column, value) for row, value in enumerate(values)]
    empty = [row for row, names in enumerate(rows) if not names and not several]
    if empty:
        remedy = "give each row one, or name the column 'labels' if rows may have none"
        raise config_error("dir", f"{path}, row {empty[0] + 1}: label is empty; {remedy}")
    found = {name for row in rows for name in row}
    if not found:
        raise config_error("dir", f"{path} has a column {column!r} without any label; remove the column")
    try:
        classes = sorted(found, key=lambda name: (float(name), str(name)))  # numbers by value, even if written as text
    except (TypeError, ValueError):
        classes = sorted(found, key=str)
    numbers = {name: number for number, name in enumerate(classes)}
    names = [str(name) for name in classes]
    if several:
        return multi_hot([[numbers[name] for name in row] for row in rows], len(classes)), names
    return np.array([numbers[name] for (name,) in rows], np.int64), names


def _class_names(path: str, row: int, column: str, value: Any) -> list[Any]:
    """Returns the classes, by number or name, in the cell of a row."""
    several = column == "labels"
    cells = value.split(CLASS_SEPARATOR) if several and isinstance(value, str) else value
    cells = cells if several and isinstance(cells, list) else [cells]
    if bad := [cell for cell in cells if isinstance(cell, list | dict | bytes)]:
        listed = isinstance(bad[0], list) and not several
        remedy = "name the column 'labels' if rows may have several classes" if listed else "give the name of a class"
        problem = f"{path}, row {row + 1}: {column} must be a number or a text, got {reprlib.repr(bad[0])}"
        raise config_error("dir", f"{problem}; {remedy}")
    names = [cell.strip() if isinstance(cell, str) else cell for cell in cells]
    return [name for name in names if not is_missing(name)]


# Batches


def epoch_order(seed: int, epoch: int, count: int) -> Int[np.ndarray, " count"]:
    """Returns the order of `count` images in an epoch; it depends on (seed, epoch) alone."""
    return stream_rng(seed, "epoch order", epoch).permutation(count)


def stream(
    images: Images, order: Int[np.ndarray, " count"], batch_size: int, *, stored_size: int = 0
) -> Iterator[Batch]:
    """Yields batches of images, resized to `stored_size` unless that is 0, in the order of the indices `order`.

    Images are decoded ahead by Grain's threads; features need no decoding. The last batch may be smaller.
    """
    if not len(order):
        return
    first = images[int(order[0])].shape
    if len(first) < 3:  # feature vectors: nothing to decode
        yield from (gather(images, order[start : start + batch_size]) for start in range(0, len(order), batch_size))
        return
    import grain  # takes a second to import, which `--help` and the search commands do not need

    def fetch(index: SupportsIndex) -> Shaped[np.ndarray, "*shape"]:
        if stored_size:
            return resized(images, int(index), stored_size)
        image = images[int(index)]
        if image.shape != first:
            shapes = f"{first} and {image.shape} (image {index})"
            remedy = "set it to the side in pixels to which all are resized, such as 256"
            problem = f"it must be set for images of different sizes, got 0 with shapes {shapes}"
            raise config_error("stored_size", f"{problem}; {remedy}")
        return image

    pipeline = grain.MapDataset.source(np.asarray(order)).map(fetch).batch(batch_size)
    yield from pipeline.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))


def materialize(
    images: Images, *, stored_size: int = 0
) -> UInt8[np.ndarray, "images height width 3"] | Float[np.ndarray, "items *views features"]:
    """Returns all images, or features, as one array, resized to squares of `stored_size` pixels unless that is 0."""
    if isinstance(images, np.ndarray) and not stored_size:
        return images
    first = images[0]
    shape = (stored_size, stored_size, 3) if stored_size else first.shape
    whole = np.empty((len(images), *shape), first.dtype)  # concatenating the batches would hold everything twice
    done = 0
    for batch in stream(images, np.arange(len(images)), 256, stored_size=stored_size):
        whole[done : done + len(batch)] = batch
        done += len(batch)
    return whole


def size_in_bytes(images: Images, *, stored_size: int = 0) -> int:
    """Returns the size of the result of `materialize`, estimated from the first image."""
    return len(images) * (stored_size * stored_size * 3 if stored_size else images[0].nbytes)
