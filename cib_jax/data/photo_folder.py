"""Data sets of photos on disk: any folder, with sub-folders as classes, or a CSV or Parquet list of paths."""

import collections
import fnmatch
import functools
import os
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from cib_jax.data import photos
from cib_jax.data.dataset import ImageSet, Labels, Source, Unreadable, config_error, parse_labels
from cib_jax.data.photo_cache import PhotoCache, PreparedPhotos
from cib_jax.data.splits import ROLES
from cib_jax.errors import DataError
from cib_jax.files import count, decode_text, first_line, printable, short_reason

FEWEST = 3

COLUMNS = ("path", "label", "labels", "split")
"""Columns of a list that have a meaning; others are ignored."""

_error = functools.partial(config_error, "dir")


def load_folder(directory: str, cache: PhotoCache, *, labeled: bool = True) -> Source:
    """Returns the photos of a folder and its sub-folders, in the order of their paths.

    If every photo is inside one of two or more folders directly under `directory`, these folders are the classes.
    """
    directory = os.path.expanduser(directory)
    if not directory:
        raise _error("it must name the folder of photos, got ''; set it with --config.data.dir=PHOTOS")
    if not os.path.exists(directory):
        raise _error(f"the folder {directory} does not exist; give the folder of photos")
    try:
        os.scandir(directory).close()
    except OSError as error:
        remedy = "give a folder that may be read, or for a list of paths set config.data.name=list"
        raise _error(f"{directory} must be a folder of photos ({short_reason(error)}); {remedy}") from error
    found = walk_folder(directory)
    if not found.paths:
        raise _error(no_photos(directory, found.others))
    prepared = _prepare(found.paths, directory, directory, cache, found.closed)
    names = [found.paths[index] for index in prepared.kept]
    labels, classes, note = _folder_classes(names) if labeled else (None, [], "")
    # Folders that cannot be read are in the list of unreadable files.
    notes = [*prepared.notes, note, *found._replace(closed=[]).notes()]
    images = ImageSet(prepared.images, labels, names)
    return Source(images, None, classes, None, prepared.unreadable, [note for note in notes if note])


def load_list(path: str, cache: PhotoCache, *, labeled: bool = True) -> Source:
    """Returns the photos that a list names, in its order.

    Its columns are `path`, relative to the folder of the list or absolute; `label` or `labels`, as in
    `dataset.parse_labels`; and `split`, one of `splits.ROLES`. All but the first are optional; others are ignored.
    """
    path = os.path.expanduser(path)
    columns = _read_columns(path)
    paths = columns["path"]
    labels, classes = parse_labels(path, columns) if labeled else (None, [])
    splits = columns.get("split", [])
    for row, role in enumerate(splits):
        if role not in ROLES:
            problem = f"{path}, row {row + 1}: split must be one of {', '.join(ROLES)}, got {reprlib.repr(role)}"
            raise _error(f"{problem}; give one of them, or remove the column")
    prepared = _prepare(paths, os.path.dirname(os.path.abspath(path)), path, cache)
    kept = prepared.kept
    images = ImageSet(prepared.images, None if labels is None else labels[kept], [paths[index] for index in kept])
    roles = None
    if splits:
        role_of = np.array(splits)[kept]
        roles = {role: images.take(np.flatnonzero(role_of == role)) for role in ROLES if (role_of == role).any()}
    return Source(images, None, classes, roles, prepared.unreadable, prepared.notes)


def _prepare(
    paths: list[str], root: str, source: str, cache: PhotoCache, closed: Sequence[Unreadable] = ()
) -> PreparedPhotos:
    """Prepares the photos of a folder or a list, and checks that enough of them can be read."""
    prepared = cache.prepare(paths, root=root, owner=source)
    unreadable = [*closed, *prepared.unreadable]
    if len(prepared.kept) < FEWEST:
        first = f" (the first: {unreadable[0]})" if unreadable else ""
        counts = f"{len(prepared.kept):,} and {count(len(unreadable), 'unreadable one')}{first}"
        raise _error(f"{source} must have {FEWEST} readable photos or more, hundreds to learn from, got {counts}")
    return prepared._replace(unreadable=unreadable)


# Folders


class FolderContent(NamedTuple):
    """Files and folders below a folder, by relative path."""

    paths: list[str]
    """Photos, sorted."""
    others: collections.Counter[str]
    """Number of other files, by extension."""
    closed: list[Unreadable]
    """Folders that cannot be read."""
    derived: list[str]
    """Folders that are left out, because they hold copies or deleted files."""

    def notes(self) -> list[str]:
        """Returns sentences for the user about what is left out."""
        notes = [skipped_files(self.others)] if self.others else []
        if self.closed:
            notes.append(f"Folders that cannot be read, left out: {len(self.closed):,}, the first: {self.closed[0]}")
        if self.derived:
            first = printable(self.derived[0])
            notes.append(f"Folders of copies or deleted files, left out: {len(self.derived):,}, the first: {first}")
        return notes


def walk_folder(directory: str, exclude: Sequence[str] = ()) -> FolderContent:
    """Returns the photos in a folder and its subfolders, and what is left out.

    Links are followed. A folder is entered once, and a file is one photo, however many links lead to it; real paths
    come before symbolic links, and those before others in their order. Hidden files and folders are skipped, those that
    `is_derived`, and those that one of the patterns `exclude` matches, as in `is_excluded`.
    """
    files: list[tuple[str, int]] = []
    file_links: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    closed: list[Unreadable] = []
    derived: list[str] = []
    folders, links, entered = [""], collections.deque[str](), set()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        try:
            status = os.stat(os.path.join(directory, folder))
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(os.path.join(directory, folder)), key=lambda entry: entry.name)
        except OSError as error:
            closed.append(Unreadable(folder or directory, short_reason(error)))
            continue
        parent = os.path.basename(os.path.join(os.path.abspath(directory), folder).rstrip("/"))
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if is_hidden(entry.name) or is_excluded(path, exclude):
                continue
            is_link = entry.is_symlink()
            if entry.is_dir(follow_symlinks=False) or (is_link and os.path.isdir(entry.path)):
                if is_derived(entry.name, parent):
                    derived.append(path)
                else:
                    (links if is_link else folders).append(path)
            elif (extension := os.path.splitext(entry.name)[1].lower()) not in photos.EXTENSIONS:
                others[extension or "without extension"] += 1
            elif is_link:
                file_links.append(path)
            else:
                files.append((path, entry.inode()))
    return FolderContent(_without_links(directory, sorted(files), sorted(file_links)), others, closed, derived)


def _without_links(directory: str, files: list[tuple[str, int]], links: list[str]) -> list[str]:
    """Returns the sorted paths of files and of symbolic links to files, each file under its first path."""
    numbers = collections.Counter(inode for _, inode in files)
    kept, seen = [], set()
    for path, inode in [*files, *((link, -1) for link in links)]:
        # Without links, the numbers that come with the names tell files apart, and none has to be looked up.
        if links or numbers[inode] > 1:
            try:
                status = os.stat(os.path.join(directory, path))
            except OSError:
                kept.append(path)  # listed with this reason when it is decoded
                continue
            # Some network file systems give the same number to different files.
            if (status.st_dev, status.st_ino) in seen and (inode < 0 or status.st_nlink > 1):
                continue
            seen.add((status.st_dev, status.st_ino))
        kept.append(path)
    return sorted(kept)


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of this name is skipped: hidden ones, and metadata that macOS adds to zips."""
    return name.startswith(".") or name == "__MACOSX"


_DERIVED = frozenset({"@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "lost+found", "#snapshot"})
_DERIVED |= {"@recently-snapshot", "system volume information"}
_LIBRARIES = (".photoslibrary", ".photolibrary", ".migratedphotolibrary", ".aplibrary")
_ORIGINALS = frozenset({"originals", "masters"})


def is_derived(name: str, parent: str) -> bool:
    """Returns whether a folder holds thumbnails, previews, snapshots or deleted files: copies of other photos.

    These are folders of NAS (Synology, QNAP), of file systems, of Windows, of Lightroom's previews, and everything but
    the originals in a library of Apple's Photos, iPhoto or Aperture.
    """
    name = name.lower()
    in_library = parent.lower().endswith(_LIBRARIES) and name not in _ORIGINALS
    return name in _DERIVED or name.endswith(".lrdata") or in_library


def is_excluded(path: str, patterns: Sequence[str]) -> bool:
    """Returns whether a shell pattern matches a relative path or, if the pattern has no slash, the path's last part."""
    name = os.path.basename(path)
    return any(fnmatch.fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)


def is_inside_excluded(path: str, patterns: Sequence[str]) -> bool:
    """Returns whether a pattern matches a path, or that of a folder in which it is."""
    parts = path.split("/")
    return any(is_excluded("/".join(parts[:count]), patterns) for count in range(1, len(parts) + 1))


def parse_patterns(exclude: str | Sequence[str]) -> list[str]:
    """Returns the patterns that a user gave: one or several, perhaps empty, perhaps with a slash at either end."""
    given = [exclude] if isinstance(exclude, str) else exclude
    return [pattern for pattern in (text.strip("/") for text in given) if pattern]


def _folder_classes(names: list[str]) -> tuple[Labels | None, list[str], str]:
    """Returns labels and classes by first-level folder, and a note for the user."""
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = sorted(set(folders))
    if "" in classes:
        return None, [], "Some photos are outside any sub-folder, so sub-folders are not used as classes: no metrics"
    if len(classes) < 2:
        note = f"All photos are in one sub-folder, {printable(classes[0])}, so there are no classes: no metrics"
        return None, [], note
    note = f"{len(classes)} sub-folders are classes, for metrics only; --config.data.labelled=False ignores them"
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in folders], np.int64), classes, note


def no_photos(where: str, others: collections.Counter[str], reason: str = "") -> str:
    """Returns the message for a folder or archive without photos, with the reason or the extensions of its files."""
    held, extensions = reason or format_extensions(others) or "nothing", ", ".join(sorted(photos.EXTENSIONS))
    return f"{where} holds no photos ({held}); give one with files named {extensions}"


def skipped_files(others: collections.Counter[str]) -> str:
    """Returns a note for the user about files without a photo's extension; "" if there are none."""
    return f"Files without a photo's extension, left out: {format_extensions(others)}" if others else ""


def format_extensions(others: collections.Counter[str]) -> str:
    """Returns the number of files by extension in words, with advice about formats that must be converted."""
    text = ", ".join(f"{count:,} {printable(extension)}" for extension, count in others.most_common(5))
    text += f" and {count(len(others) - 5, 'more kind')}" if len(others) > 5 else ""
    unread = sorted(photos.CONVERTED & others.keys())
    return text + (f"; {' and '.join(unread)} must be converted first" if unread else "")


# Lists


def read_list_paths(path: str) -> list[str]:
    """Returns the paths in a list of photos, in its order."""
    return _read_columns(path)["path"]


def _read_columns(path: str) -> dict[str, list[Any]]:
    """Returns the columns of a list that have a meaning, by name."""
    if not os.path.isfile(path):
        raise _error(f"the file {path!r} does not exist; give a .csv or .parquet list of photos")
    extension = os.path.splitext(path)[1].lower()
    if extension not in _READERS:
        raise _error(f"{path} must be a .csv or .parquet file; save the list as one of them")
    try:
        table = _READERS[extension](path)
        names = [name.strip() for name in table.column_names]
        found = [(place, name) for place, name in enumerate(names) if name in COLUMNS]
        cells = [table.column(place).to_pylist() for place, _ in found]
    except DataError:
        raise
    except Exception as error:  # Parquet's reader raises any class for damaged bytes
        raise _error(f"{path} cannot be read as {extension[1:]} ({first_line(error)}); correct it") from error
    columns: dict[str, list[Any]] = {}
    for (place, name), values in zip(found, cells, strict=True):
        if name in columns:
            raise _error(f"{path} must have one column {name!r}, got several; rename or remove the others")
        # Where a space follows the comma in the header, it does so in the rows. Otherwise it is part of a path.
        padded = name != "path" or table.column_names[place] != name
        columns[name] = [cell.strip() if padded and isinstance(cell, str) else cell for cell in values]
    if "path" not in columns:
        held = reprlib.repr(names)
        raise _error(f"{path} must have a column 'path', got {held}; name the columns in a first row, with commas")
    _validate_paths(path, columns["path"])
    return columns


def _validate_paths(path: str, names: list[Any]) -> None:
    """Checks that each row of a list names another photo."""
    if not names:
        raise _error(f"{path} names no photo; add a row for each")
    folder = os.path.dirname(os.path.abspath(path))
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        if not isinstance(name, str) or not name:
            problem = f"{path}, row {row + 1}: path must be text, got {reprlib.repr(name)}"
            raise _error(f"{problem}; give the path of a photo, or remove the row")
        if (first := rows.setdefault(os.path.normpath(os.path.join(folder, name)), row)) != row:
            problem = f"{path} must name each photo once, got {name!r} in rows {first + 1} and {row + 1}"
            raise _error(f"{problem}; remove one of them")


def _read_csv(path: str) -> pyarrow.Table:
    """Returns a CSV file as a table of texts: labels such as 007 are names, not numbers."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        content = decode_text(content).encode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _error(f"{path}, line {line}: the text must be in UTF-8; save the list as CSV UTF-8") from error
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)

    def options(length: int) -> pyarrow.csv.ReadOptions:
        # In one block, because a row must not be longer than a block. With threads, errors would not name the row.
        return pyarrow.csv.ReadOptions(use_threads=False, block_size=min(length + 1, 2**31 - 1))

    with pyarrow.csv.open_csv(pyarrow.BufferReader(content), options(len(content)), parsing) as reader:
        names = reader.schema.names
    # A quote that is never closed would make one cell of all rows after it, and of the empty row added here.
    content += b'\n""' + b"," * (len(names) - 1)
    texts = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
    table = pyarrow.csv.read_csv(pyarrow.BufferReader(content), options(len(content)), parsing, texts)
    if any(column[-1].as_py() for column in table.columns):
        raise _error(f"{path}, row {len(table)}: a quoted cell has no closing quote; close it")
    return table[:-1]


def _read_parquet(path: str) -> pyarrow.Table:
    file = pyarrow.parquet.ParquetFile(path)
    return file.read([name for name in file.schema_arrow.names if name.strip() in COLUMNS])


_READERS: dict[str, Callable[[str], pyarrow.Table]] = {".csv": _read_csv, ".parquet": _read_parquet}
