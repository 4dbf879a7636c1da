"""The photos of a zip that anyone may have made, unpacked into a folder of their own."""

import collections
import contextlib
import json
import os
import pathlib
import shutil
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from cib_jax.data import photo_folder
from cib_jax.data.dataset import Unreadable
from cib_jax.data.photos import EXTENSIONS
from cib_jax.errors import DataError
from cib_jax.files import printable

MOST_FILES = 1_000_000
MOST_GB = 100
"""Of all photos together, unpacked, in billions of bytes."""
MOST_PHOTO_MB = 500
"""Of one photo, in millions of bytes."""

_MADE = ".unzipped.json"
"""In a folder that was unpacked: what zip it is of."""
_CHUNK = 1 << 20
_BOMB_GB, _BOMB_TIMES = 1, 100
"""Unpacked, and against the zip's own size: photos hardly get smaller in a zip."""


class Unzipped(NamedTuple):
    """What came of a zip."""

    directory: pathlib.Path
    """That holds the photos, under the names that they have in the zip."""
    photos: int
    others: collections.Counter[str]
    """Files that are no photos by name, left out, counted by extension."""
    refused: list[Unreadable]
    """Photos by name that were left out, each with the reason."""

    def told(self) -> list[str]:
        """Returns what a user should be told, a sentence each."""
        sentences = [f"{self.photos:,} photos unpacked in {self.directory}"]
        if self.others:
            left = f"{photo_folder.counted(self.others)}{photo_folder.heic_hint(self.others)}"
            sentences.append(f"Not photos by name, left out: {left}")
        if self.refused:
            first = f"{printable(self.refused[0].path)}: {self.refused[0].reason}"
            sentences.append(f"{len(self.refused):,} left out, the first: {first}")
        return sentences


def unzip(archive: pathlib.Path | str, directory: pathlib.Path | str | None = None) -> Unzipped:
    """Returns a folder with the photos of a zip: unpacked whole or not at all, once for each zip.

    Files keep their names, folders and times, so that an index sees which photos of a later zip are the same. No name
    leads out of the folder; nothing but photos by name is written, no link, and no more than the zip says of itself,
    which is bounded. Whether a photo is one, only decoding it tells.

    Args:
      archive: the zip.
      directory: to make; what an earlier call unpacked there, of another zip, is replaced. None: beside the zip, of its
        name without the extension.

    Raises:
      DataError: there is no zip, it is damaged, holds no photo or too much, or `directory` holds something else.
    """
    archive = pathlib.Path(archive).expanduser()
    directory = pathlib.Path(directory).expanduser() if directory is not None else archive.with_suffix("")
    if not archive.is_file():
        raise DataError(f"{archive}: there is no such zip; give the file, such as photos.zip")
    known = _known(archive)
    if (before := _before(directory)) and before["zip"] == known:
        others, refused = collections.Counter(before["others"]), [Unreadable(*one) for one in before["refused"]]
        return Unzipped(directory, before["photos"], others, refused)
    _check_free(archive, directory, ours=before is not None)
    with _opened(archive) as opened:
        entries, others, refused = _chosen(archive, opened)
        _check_room(archive, directory, entries)
        with _beside(directory) as fresh:
            count = 0
            for entry, name in entries:
                if reason := _write(archive, opened, entry, fresh / name):
                    refused.append(Unreadable(name, reason))
                else:
                    count += 1
            if not count:
                first = f"{printable(refused[0].path)}: {refused[0].reason}"
                raise DataError(f"{archive}: not one of its photos can be unpacked, the first: {first}; zip them again")
            left = [(one.path, one.reason) for one in refused]
            made = {"zip": known, "photos": count, "others": others, "refused": left}
            (fresh / _MADE).write_text(json.dumps(made), encoding="ascii")
            _swap(archive, fresh, directory)
    return Unzipped(directory, count, others, refused)


def _swap(archive: pathlib.Path, fresh: pathlib.Path, directory: pathlib.Path) -> None:
    try:
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(fresh, directory)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise DataError(f"{archive}: {directory} cannot be replaced ({why}); give another folder") from error


def _known(archive: pathlib.Path) -> list[int]:
    found = archive.stat()
    return [found.st_size, found.st_mtime_ns]


def _before(directory: pathlib.Path) -> dict[str, Any] | None:
    """Returns what an earlier call noted in its folder, None where it is not one."""
    try:
        return dict(json.loads((directory / _MADE).read_text(encoding="ascii")))
    except (OSError, ValueError, TypeError):
        return None


def _check_free(archive: pathlib.Path, directory: pathlib.Path, *, ours: bool) -> None:
    if directory == archive or (directory.exists() and not directory.is_dir()):
        raise DataError(f"{archive}: {directory} is a file, where its photos would be unpacked; give another folder")
    if directory.is_dir() and not ours and any(directory.iterdir()):
        raise DataError(
            f"{archive}: {directory} holds other files already, where its photos would be unpacked; give that folder "
            "itself, or another one to unpack in"
        )


@contextlib.contextmanager
def _opened(archive: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    try:
        opened = zipfile.ZipFile(archive)
    except OSError as error:
        raise DataError(f"{archive}: it cannot be read ({(error.strerror or str(error)).lower()})") from error
    except Exception as error:  # whatever damaged bytes make zipfile raise
        raise DataError(
            f"{archive}: it is no zip, or a damaged one ({_first_line(error)}); copy it again, or zip the photos anew"
        ) from error
    with opened:
        yield opened


def _chosen(
    archive: pathlib.Path, opened: zipfile.ZipFile
) -> tuple[list[tuple[zipfile.ZipInfo, str]], collections.Counter[str], list[Unreadable]]:
    """Returns the photos, each with the name that it gets; other files counted; and photos that are left out."""
    entries: list[tuple[zipfile.ZipInfo, str]] = []
    others: collections.Counter[str] = collections.Counter()
    refused: list[Unreadable] = []
    names: set[str] = set()
    found = opened.infolist()
    if len(found) > MOST_FILES:
        raise DataError(f"{archive}: it holds {len(found):,} files, more than {MOST_FILES:,}; unpack it yourself")
    for entry in found:
        name = entry.filename.replace("\\", "/")  # as some programs of Windows write it
        parts = name.split("/")
        # As `folder.walk` sees a folder.
        if entry.is_dir() or any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts):
            continue
        extension = os.path.splitext(parts[-1])[1].lower()
        if extension not in EXTENSIONS:
            others[extension or "without extension"] += 1
        elif reason := _objection(entry, parts) or ("its name is there twice" if name in names else ""):
            refused.append(Unreadable(name, reason))
        else:
            names.add(name)
            entries.append((entry, name))
    if not entries:
        seen = photo_folder.counted(others) + photo_folder.heic_hint(others) if others else "nothing"
        if refused:
            seen = f"{printable(refused[0].path)}: {refused[0].reason}"
        raise DataError(
            f"{archive}: it holds no photos that can be unpacked ({seen}); zip files named "
            f"{', '.join(sorted(EXTENSIONS))}"
        )
    return entries, others, refused


def _objection(entry: zipfile.ZipInfo, parts: list[str]) -> str:
    """Returns why an entry is not unpacked, "" where it is."""
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if any(part in ("", "..") for part in parts) or ":" in parts[0]:
        return "its name leads out of the folder"
    if len(os.fsencode("/".join(parts))) > 1000 or any(len(os.fsencode(part)) > 200 for part in parts):
        return "its name is too long"
    if kind and not stat.S_ISREG(kind):
        return "a link, or no file"
    if entry.flag_bits & 1:
        return "locked by a password"
    if entry.file_size > MOST_PHOTO_MB * 1_000_000:
        return f"more than {MOST_PHOTO_MB} MB"
    return ""


def _check_room(archive: pathlib.Path, directory: pathlib.Path, entries: list[tuple[zipfile.ZipInfo, str]]) -> None:
    """Checks what the zip says of itself: no entry is read further than that."""
    size = sum(entry.file_size for entry, _ in entries)
    if size > MOST_GB * 1_000_000_000:
        raise DataError(f"{archive}: its photos are {size / 1e9:,.0f} GB, more than {MOST_GB}; unpack it yourself")
    if size > max(_BOMB_GB * 1_000_000_000, _BOMB_TIMES * archive.stat().st_size):
        raise DataError(
            f"{archive}: its {archive.stat().st_size / 1e6:,.1f} MB would become {size / 1e9:,.1f} GB, which photos do "
            "not: a decompression bomb; unpack it yourself if it is none"
        )
    free = shutil.disk_usage(_standing(directory)).free
    if size > free:
        raise DataError(
            f"{archive}: its photos are {size / 1e9:,.1f} GB, and {directory.parent} has room for {free / 1e9:,.1f}; "
            "make room, or unpack it elsewhere"
        )


def _standing(directory: pathlib.Path) -> pathlib.Path:
    return next(parent for parent in directory.absolute().parents if parent.is_dir())


@contextlib.contextmanager
def _beside(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a fresh folder on the same disk, which is removed if it is still there in the end."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        fresh.chmod(0o755)
    except OSError as error:
        raise DataError(f"{directory}: it cannot be made ({(error.strerror or str(error)).lower()})") from error
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(archive: pathlib.Path, opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: pathlib.Path) -> str:
    """Returns why a photo could not be written, "" where it was."""
    try:
        source = opened.open(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        with source, path.open("xb") as file:
            shutil.copyfileobj(source, file, _CHUNK)  # no more than `file_size`, and of the right checksum
        with contextlib.suppress(ValueError, OverflowError):  # a day that is in no calendar
            at = time.mktime((*entry.date_time, 0, 0, -1))
            os.utime(path, (at, at))
    except (FileExistsError, NotADirectoryError):
        return "another file of the zip has its place"
    except OSError as error:
        if error.errno is None:  # of a decompressor
            path.unlink(missing_ok=True)
            return f"damaged ({_first_line(error)})"
        raise DataError(
            f"{archive}: {printable(entry.filename)} cannot be unpacked ({(error.strerror or str(error)).lower()})"
        ) from error
    except Exception as error:  # whatever damaged bytes make zipfile and its decompressors raise
        path.unlink(missing_ok=True)
        return f"damaged ({_first_line(error)})"
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
