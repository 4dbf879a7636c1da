"""A list of photos, in a CSV or Parquet file: paths, and where they are known, labels and splits."""

import collections
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from cib_jax.data import folder, photos, prepared
from cib_jax.data.images import Bar, DataError, ImageSet, Labels, Source, no_bar
from cib_jax.data.splits import ROLES

SEPARATOR = "|"
"""Between the labels of one photo in a CSV file."""


def load(
    path: str,
    *,
    labelled: bool = True,
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
      labelled: False leaves labels aside.
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
    labels, classes = _labels(path, columns) if labelled else (None, [])
    split = _texts(path, columns, "split") if "split" in columns else None
    for number, role in enumerate(split or ()):
        if role not in ROLES:
            raise DataError(
                f"config.data.dir: {path}, row {number + 1}: split is {role!r}, not one of {', '.join(ROLES)}"
            )
    root = os.path.dirname(os.path.abspath(path))
    made = prepared.prepare(
        named, root=root, owner=path, size=size, cache=cache, max_megapixels=max_megapixels, bar=bar
    )
    folder.check_enough(path, len(made.kept), made.unreadable)
    kept: Int[np.ndarray, " images"] = made.kept
    whole = ImageSet(made.images, None if labels is None else labels[kept], [named[index] for index in kept])
    roles = None
    if split is not None:
        of_kept = np.array(split)[kept]
        roles = {role: whole.take(np.flatnonzero(of_kept == role)) for role in ROLES if (of_kept == role).any()}
    return Source(whole, None, classes, roles, made.unreadable, made.notes)


def names(path: str) -> list[str]:
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
