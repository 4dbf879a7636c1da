"""Any folder of photos, however it came to be; sub-folders may be classes."""

import collections
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from cib_jax.data import photo_cache, photos
from cib_jax.data.dataset import Bar, ImageSet, Labels, Source, Unreadable, no_bar
from cib_jax.data.splits import ROLES
from cib_jax.errors import DataError
from cib_jax.files import printable

# data.folder: Any folder of photos, however it came to be; sub-folders may be classes.


FEWEST = 3


def load_folder(
    directory: str,
    *,
    labeled: bool = True,
    size: int,
    cache: pathlib.Path,
    max_megapixels: int = photos.MAX_MEGAPIXELS,
    bar: Bar = no_bar,
) -> Source:
    """Returns the photos of a folder and of all folders in it, in the order of their paths.

    Where every photo lies in one of two or more folders right under `directory`, these are the classes.

    Args:
      directory: the folder.
      labeled: False leaves classes aside.
      size: side to which photos are resized, in pixels.
      cache: where prepared photos are kept.
      max_megapixels: larger photos are unreadable.
      bar: shows the progress.

    Raises:
      DataError: there is no such folder, it cannot be read, or holds fewer than three readable photos.
    """
    directory = os.path.expanduser(directory)
    _check(directory)
    paths, others, unreadable = walk_folder(directory)
    if not paths:
        seen = f"only {counted(others)}{heic_hint(others)}" if others else "nothing"
        raise DataError(
            f"config.data.dir: {directory} holds no photos ({seen}); give a folder with files named "
            f"{', '.join(sorted(photos.EXTENSIONS))}"
        )
    made = photo_cache.prepare(
        paths, root=directory, owner=directory, size=size, cache=cache, max_megapixels=max_megapixels, bar=bar
    )
    unreadable = [*unreadable, *made.unreadable]
    names = [paths[index] for index in made.kept]
    validate_enough_images(directory, len(names), unreadable)
    labels, classes, note = _classes(names) if labeled else (None, [], "")
    notes = [*made.notes, note]
    if others:
        notes.append(f"Not photos by name, left out: {counted(others)}{heic_hint(others)}")
    return Source(
        ImageSet(made.images, labels, names),
        None,
        classes,
        unreadable=unreadable,
        notes=[note for note in notes if note],
    )


def validate_enough_images(where: str, count: int, unreadable: list[Unreadable]) -> None:
    """Checks that there are enough photos to learn from.

    Raises:
      DataError: there are fewer than three.
    """
    if count < FEWEST:
        first = f" (the first: {printable(unreadable[0].path)}: {unreadable[0].reason})" if unreadable else ""
        raise DataError(
            f"config.data.dir: {where} has {count} readable photos and {len(unreadable)} unreadable ones{first}; at "
            f"least {FEWEST} readable ones are needed, and some hundred to learn anything from"
        )


def walk_folder(directory: str) -> tuple[list[str], collections.Counter[str], list[Unreadable]]:
    """Returns the relative paths of photos, sorted; other files counted by extension; and folders that stay closed.

    Links are followed, each folder is entered once, and hidden ones not at all. Real folders come before links to
    them, so that a photo is known by the path that its owner gave it.
    """
    paths: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    closed: list[Unreadable] = []
    waiting, links, entered = [""], collections.deque[str](), set()
    while waiting or links:
        inside = waiting.pop() if waiting else links.popleft()
        try:
            found = os.stat(os.path.join(directory, inside))
            if (found.st_dev, found.st_ino) in entered:
                continue
            entered.add((found.st_dev, found.st_ino))
            entries = sorted(os.scandir(os.path.join(directory, inside)), key=lambda entry: entry.name)
        except OSError as error:
            closed.append(Unreadable(inside, (error.strerror or str(error)).lower()))
            continue
        for entry in entries:
            path = f"{inside}/{entry.name}" if inside else entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if _is_folder(entry):
                links.append(path) if entry.is_symlink() else waiting.append(path)
            elif (extension := os.path.splitext(entry.name)[1].lower()) in photos.EXTENSIONS:
                paths.append(path)
            else:
                others[extension or "without extension"] += 1
    return sorted(paths), others, closed


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle
        return False


def _check(directory: str) -> None:
    if not directory:
        raise DataError("config.data.dir: it is empty; give the folder of photos by --config.data.dir=PHOTOS")
    if not os.path.exists(directory):
        raise DataError(f"config.data.dir: there is no folder {directory}; give the folder of photos")
    if not os.path.isdir(directory):
        raise DataError(
            f"config.data.dir: {directory} is a file; give a folder, or config.data.name=list for a list of paths"
        )
    try:
        os.scandir(directory).close()
    except OSError as error:
        raise DataError(
            f"config.data.dir: {directory} cannot be read ({(error.strerror or str(error)).lower()}); give a folder "
            "that you may read"
        ) from error


def _classes(names: list[str]) -> tuple[Labels | None, list[str], str]:
    first = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = sorted(set(first))
    if "" in classes:
        return (
            None,
            [],
            "Photos lie right in the folder, so sub-folders are not taken for classes: nothing to measure by",
        )
    if len(classes) < 2:
        return (
            None,
            [],
            f"All photos lie in one sub-folder, {printable(classes[0])}, which is no class: nothing to measure by",
        )
    numbers = {name: number for number, name in enumerate(classes)}
    note = (
        f"{len(classes)} sub-folders are taken for classes, which serve only to measure; "
        "--config.data.labelled=False leaves them aside"
    )
    return np.array([numbers[name] for name in first], np.int64), classes, note


def counted(others: collections.Counter[str]) -> str:
    """Returns how many files of which extensions, in words."""
    return ", ".join(f"{count:,} {printable(extension)}" for extension, count in others.most_common(5)) + (
        f" and {len(others) - 5} more kinds" if len(others) > 5 else ""
    )


def heic_hint(others: collections.Counter[str]) -> str:
    """Returns what to do about photos of formats that are not read; "" where there is none."""
    return "; .heic and .avif must be converted first" if {".heic", ".heif", ".avif"} & others.keys() else ""


# data.lists: A list of photos, in a CSV or Parquet file: paths, and where they are known, labels and splits.


SEPARATOR = "|"
"""Between the labels of one photo in a CSV file."""


def load_list(
    path: str,
    *,
    labeled: bool = True,
    size: int,
    cache: pathlib.Path,
    max_megapixels: int = photos.MAX_MEGAPIXELS,
    bar: Bar = no_bar,
) -> Source:
    """Returns the photos that a list names, in its order.

    Its columns are `path`, relative to the list's own folder or absolute; `label`, the name or number of a class, or
    `labels`, any number of them, in CSV as one text with "|" between them; and `split`, one of `splits.ROLES`. All but
    the first may be missing, and others are not looked at.

    Args:
      path: of the list, .csv or .parquet.
      labeled: False leaves labels aside.
      size: side to which photos are resized, in pixels.
      cache: where prepared photos are kept.
      max_megapixels: larger photos are unreadable.
      bar: shows the progress.

    Raises:
      DataError: the list cannot be read or says something that cannot be, or too few photos are readable.
    """
    path = os.path.expanduser(path)
    columns = _columns(path)
    named = _names(path, columns)
    labels, classes = _labels(path, columns) if labeled else (None, [])
    split = _texts(path, columns, "split") if "split" in columns else None
    for number, role in enumerate(split or ()):
        if role not in ROLES:
            raise DataError(
                f"config.data.dir: {path}, row {number + 1}: split is {role!r}, not one of {', '.join(ROLES)}"
            )
    root = os.path.dirname(os.path.abspath(path))
    made = photo_cache.prepare(
        named, root=root, owner=path, size=size, cache=cache, max_megapixels=max_megapixels, bar=bar
    )
    validate_enough_images(path, len(made.kept), made.unreadable)
    kept: Int[np.ndarray, " images"] = made.kept
    whole = ImageSet(made.images, None if labels is None else labels[kept], [named[index] for index in kept])
    roles = None
    if split is not None:
        of_kept = np.array(split)[kept]
        roles = {role: whole.take(np.flatnonzero(of_kept == role)) for role in ROLES if (of_kept == role).any()}
    return Source(whole, None, classes, roles, made.unreadable, made.notes)


def is_list_file(path: str) -> list[str]:
    """Returns the paths that a list names, in its order.

    Raises:
      DataError: the list cannot be read, or names no photo, or one twice.
    """
    return _names(path, _columns(path))


def _names(path: str, columns: dict[str, list[Any]]) -> list[str]:
    found = _texts(path, columns, "path")
    if len(set(found)) < len(found):
        twice = collections.Counter(found).most_common(1)[0][0]
        raise DataError(f"config.data.dir: {path} names {twice!r} twice; leave one of the two rows out")
    return found


def _columns(path: str) -> dict[str, list[Any]]:
    """Returns the list's columns by name."""
    import pyarrow
    import pyarrow.parquet

    readers: dict[str, Callable[[str], Any]] = {".csv": _csv, ".parquet": pyarrow.parquet.read_table}
    if not os.path.isfile(path):
        raise DataError(
            f"config.data.dir: there is no file {path or 'named'}; give the list of photos, a .csv or .parquet file"
        )
    extension = os.path.splitext(path)[1].lower()
    if extension not in readers:
        raise DataError(f"config.data.dir: {path} is neither .csv nor .parquet; write the list as one of them")
    try:
        table = readers[extension](path)
    except (OSError, pyarrow.ArrowException) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(
            f"config.data.dir: {path} cannot be read as {extension[1:]} ({first}); mend the file"
        ) from error
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    if "path" not in columns:
        raise DataError(
            f"config.data.dir: {path} has no column 'path', but {', '.join(map(repr, columns)) or 'none'}; name the "
            "photos' paths so, in the first row of a CSV file"
        )
    if not columns["path"]:
        raise DataError(f"config.data.dir: {path} names no photo; give a row for each")
    return columns


def _csv(path: str) -> Any:
    """Returns a CSV file as a table of texts: labels such as 007 are names, not numbers."""
    import pyarrow
    import pyarrow.csv

    with pyarrow.csv.open_csv(path) as reader:
        names = reader.schema.names
    texts = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
    return pyarrow.csv.read_csv(path, convert_options=texts)


def _texts(path: str, columns: dict[str, list[Any]], name: str) -> list[str]:
    for number, value in enumerate(columns[name]):
        if not isinstance(value, str) or not value:
            raise DataError(f"config.data.dir: {path}, row {number + 1}: {name} is {value!r}; give it as text")
    return columns[name]


def _labels(path: str, columns: dict[str, list[Any]]) -> tuple[Labels | None, Sequence[str]]:
    if "label" in columns and "labels" in columns:
        raise DataError(f"config.data.dir: {path} has both 'label' and 'labels'; leave one of the columns out")
    if "label" in columns:
        values = columns["label"]
        for number, value in enumerate(values):
            if value is None or value == "":
                raise DataError(
                    f"config.data.dir: {path}, row {number + 1}: label is empty; give one, or name the column 'labels' "
                    "if photos may have none"
                )
        classes = _ordered(set(values))
        numbers = {value: number for number, value in enumerate(classes)}
        return np.array([numbers[value] for value in values], np.int64), [str(value) for value in classes]
    if "labels" not in columns:
        return None, []
    sets = [
        [part for part in value.split(SEPARATOR) if part] if isinstance(value, str) else list(value or ())
        for value in columns["labels"]
    ]
    classes = _ordered({label for labels in sets for label in labels})
    if not classes:
        raise DataError(f"config.data.dir: {path} has a column 'labels' without any label; leave the column out")
    numbers = {value: number for number, value in enumerate(classes)}
    hot = np.zeros((len(sets), len(classes)), bool)
    for row, labels in zip(hot, sets, strict=True):
        row[[numbers[label] for label in labels]] = True
    return hot, [str(value) for value in classes]


def _ordered(values: set[Any]) -> list[Any]:
    """Returns class names in order: numbers by value, even where they are written as text."""
    try:
        return sorted(values, key=lambda value: (float(value), str(value)))
    except (TypeError, ValueError):
        return sorted(values, key=str)
