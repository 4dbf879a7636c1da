"""Any folder of photos, however it came to be; sub-folders may be classes."""

import collections
import os
import pathlib

import numpy as np

from cib_jax.data import photos, prepared
from cib_jax.data.images import Bar, DataError, ImageSet, Labels, Source, Unreadable, no_bar
from cib_jax.data.names import printable

FEWEST = 3


def load(
    directory: str,
    *,
    labelled: bool = True,
    size: int,
    cache: pathlib.Path,
    max_megapixels: int = photos.MAX_MEGAPIXELS,
    bar: Bar = no_bar,
) -> Source:
    """Returns the photos of a folder and of all folders in it, in the order of their paths.

    Where every photo lies in one of two or more folders right under `directory`, these are the classes.

    Args:
      directory: the folder.
      labelled: False leaves classes aside.
      size: side to which photos are resized, in pixels.
      cache: where prepared photos are kept.
      max_megapixels: larger photos are unreadable.
      bar: shows the progress.

    Raises:
      DataError: there is no such folder, it cannot be read, or holds fewer than three readable photos.
    """
    directory = os.path.expanduser(directory)
    _check(directory)
    paths, others, unreadable = walk(directory)
    if not paths:
        seen = f"only {counted(others)}" if others else "nothing"
        raise DataError(
            f"config.data.dir: {directory} holds no photos ({seen}); give a folder with files named "
            f"{', '.join(sorted(photos.EXTENSIONS))}"
        )
    made = prepared.prepare(
        paths, root=directory, owner=directory, size=size, cache=cache, max_megapixels=max_megapixels, bar=bar
    )
    unreadable = [*unreadable, *made.unreadable]
    names = [paths[index] for index in made.kept]
    check_enough(directory, len(names), unreadable)
    labels, classes, note = _classes(names) if labelled else (None, [], "")
    notes = [*made.notes, note]
    if others:
        hint = "; .heic and .avif must be converted first" if {".heic", ".heif", ".avif"} & others.keys() else ""
        notes.append(f"Not photos by name, left out: {counted(others)}{hint}")
    return Source(
        ImageSet(made.images, labels, names),
        None,
        classes,
        unreadable=unreadable,
        notes=[note for note in notes if note],
    )


def check_enough(where: str, count: int, unreadable: list[Unreadable]) -> None:
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


def walk(directory: str) -> tuple[list[str], collections.Counter[str], list[Unreadable]]:
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
