"""Extraction of photos from zip archives of unknown origin."""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import stat
import tempfile
import time
import zipfile
from typing import Any, NamedTuple

from cib_jax.console import library_bar
from cib_jax.data import photo_folder
from cib_jax.data.dataset import Unreadable, data_error
from cib_jax.data.inputs import blame_field
from cib_jax.data.photos import EXTENSIONS
from cib_jax.files import count, first_line, read_json, short_reason

MAX_FILES = 1_000_000
MAX_GB = 100
"""Limit for all photos together, unpacked, in billions of bytes."""
MAX_PHOTO_MB = 500
"""Limit for one photo, in millions of bytes."""

_RECORD = ".unzipped.json"
"""File in an unpacked folder that identifies the zip and what was unpacked from it: to reuse or replace the folder."""
_BOMB_GB, _BOMB_RATIO = 1, 100
"""Limits of the unpacked size, absolute and relative to the zip, above both of which it is a decompression bomb."""

_error = functools.partial(data_error, "archive")


class Unzipped(NamedTuple):
    """Folder with the photos of a zip, their number, that of other files by extension, and the photos left out."""

    directory: pathlib.Path
    photos: int
    others: collections.Counter[str]
    refused: list[Unreadable]

    def notes(self) -> list[str]:
        """Returns sentences for the user about the photos and what was left out."""
        notes = [f"{count(self.photos, 'photo')} unpacked in {self.directory}"]
        if self.others:
            notes.append(photo_folder.skipped_files(self.others))
        if self.refused:
            notes.append(f"{count(len(self.refused), 'photo')} left out, the first: {self.refused[0]}")
        return notes

    def told(self) -> list[str]:
        """Returns `notes()`, under its older name."""
        return self.notes()


def unzip(
    archive: pathlib.Path | str, directory: pathlib.Path | str | None = None, *, progress: bool = True
) -> Unzipped:
    """Unpacks the photos of a zip into a folder, completely or not at all, and only once for each zip.

    Files keep their names, folders and times, so that an index recognizes the photos of a later zip. Only regular files
    with a photo's extension are written, inside the folder, and no more bytes than the zip announces, which are
    limited. Whether a file is a photo shows when it is decoded.

    Args:
      archive: Path of the zip.
      directory: Folder to create. What an earlier call unpacked there from another zip is replaced, unless files were
        added or changed since. None: the path of the zip without its extension.
      progress: Whether work of more than a second shows a progress bar in terminals and notebooks.

    Raises:
      DataError: The zip does not exist, is damaged, or holds no photo or too much, or `directory` holds other files.

    Examples:
      >>> import shutil
      >>> import cib_jax as cib
      >>> archive = shutil.make_archive("photos", "zip", "PHOTOS")
      >>> cib.unzip_photos("photos.zip").notes()
      ['3 photos unpacked in photos']
    """
    archive = pathlib.Path(archive).expanduser()
    directory = pathlib.Path(directory).expanduser() if directory is not None else archive.with_suffix("")
    with blame_field(str(archive), instead_of="archive"):
        if not archive.is_file():
            raise _error("this file does not exist; give a zip, such as photos.zip")
        status = archive.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        record = _read_record(directory)
        if not record or record["zip"] != stamp:
            if directory == archive or (directory.exists() and not directory.is_dir()):
                raise _error(f"its photos cannot be unpacked in {directory}, which is a file; give another folder")
            _validate_replaceable(directory, record)  # before minutes of unpacking, and again after them
            record = _unpack(archive, directory, stamp, progress)
    others, refused = collections.Counter(record["others"]), [Unreadable(*file) for file in record["refused"]]
    return Unzipped(directory, record["photos"], others, refused)


def _unpack(archive: pathlib.Path, directory: pathlib.Path, stamp: list[int], progress: bool) -> dict[str, Any]:
    """Unpacks a zip in a temporary folder, which then replaces `directory`; returns the record."""
    try:
        opened = zipfile.ZipFile(archive)
    except Exception as error:  # damaged bytes can make zipfile raise anything
        raise _error(f"it cannot be read as a zip ({short_reason(error)}); copy or zip the photos again") from error
    try:
        with opened:
            members, others, refused = _select_members(opened)
            _validate_size(sum(member.file_size for member in members.values()), archive, directory)
            directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
                fresh = pathlib.Path(temporary) / "photos"
                fresh.mkdir()
                reasons = {}
                with library_bar("Unpacking photos", len(members), progress, "photos", delay=1) as advance:
                    for name, member in members.items():
                        reasons[name] = _extract(opened, member, fresh / name)
                        advance(1)
                refused += [Unreadable(name, reason) for name, reason in reasons.items() if reason]
                if all(reasons.values()):
                    raise _error(f"no photo can be unpacked (the first: {refused[0]}); zip them again")
                count = list(reasons.values()).count("")
                record = {"zip": stamp, "photos": count, "others": others, "refused": refused}
                record["digest"] = _digest(fresh)
                (fresh / _RECORD).write_text(json.dumps(record), encoding="ascii")
                _validate_replaceable(directory, _read_record(directory))
                if directory.exists():
                    os.replace(directory, pathlib.Path(temporary) / "replaced")
                os.replace(fresh, directory)
    except OSError as error:
        raise _error(f"it cannot be unpacked in {directory} ({short_reason(error)}); give another folder") from error
    return record


def _read_record(directory: pathlib.Path) -> dict[str, Any] | None:
    """Returns the record of an earlier call, or None if the folder has none that is valid."""
    try:
        record = read_json(directory / _RECORD)
        size, modified = record["zip"]
        right = all(isinstance(number, int) for number in (size, modified, record["photos"]))
        right = right and all(isinstance(number, int) for number in record["others"].values())
        texts = [text for path, reason in record["refused"] for text in (path, reason)]
        return record if right and all(isinstance(text, str) for text in texts) else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def _validate_replaceable(directory: pathlib.Path, record: dict[str, Any] | None) -> None:
    """Checks that a folder holds nothing but what an earlier call unpacked there, unchanged."""
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    # A record of an earlier version has no digest, so that nobody knows what was added.
    if record is None or record.get("digest") != _digest(directory):
        problem = f"{directory}, which holds other or changed files"
        raise _error(f"its photos cannot be unpacked in {problem}; give another folder, or move that one away")


def _digest(directory: pathlib.Path) -> str:
    """Returns a digest of the names, sizes and times of all files and links in a folder, but for the record."""
    found = []
    for folder, folders, names in os.walk(directory):
        for name in names + [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            found.append((os.path.relpath(path, directory), status.st_size, status.st_mtime_ns))
    listed = json.dumps(sorted(one for one in found if one[0] != _RECORD))
    return hashlib.sha256(listed.encode()).hexdigest()


def _select_members(
    opened: zipfile.ZipFile,
) -> tuple[dict[str, zipfile.ZipInfo], collections.Counter[str], list[Unreadable]]:
    """Returns the photos by relative path, the number of other files by extension, and rejected photos."""
    members: dict[str, zipfile.ZipInfo] = {}
    others: collections.Counter[str] = collections.Counter()
    refused: list[Unreadable] = []
    infos = opened.infolist()
    if len(infos) > MAX_FILES:
        raise _error(f"it must hold at most {MAX_FILES:,} files, got {len(infos):,}; unpack it yourself")
    for member in infos:
        name = member.filename.replace("\\", "/")  # some programs on Windows write backslashes
        parts = name.split("/")
        folders = itertools.pairwise(["", *parts[:-1]])
        if member.is_dir() or any(photo_folder.is_hidden(part) and part != ".." for part in parts):
            continue
        if any(photo_folder.is_derived(folder, parent) for parent, folder in folders):
            continue
        extension = os.path.splitext(name)[1].lower()
        if extension not in EXTENSIONS:
            others[extension or "without extension"] += 1
        elif reason := _rejection(member, parts) or ("its name occurs twice" if name in members else ""):
            refused.append(Unreadable(name, reason))
        else:
            members[name] = member
    if not members:
        raise _error(photo_folder.no_photos("it", others, str(refused[0]) if refused else ""))
    return members, others, refused


def _rejection(member: zipfile.ZipInfo, parts: list[str]) -> str:
    """Returns the reason why a member is not unpacked, or "" if it is."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    if any(part in ("", "..") for part in parts) or ":" in parts[0]:
        return "its name leads out of the folder"
    if len(os.fsencode("/".join(parts))) > 1000 or any(len(os.fsencode(part)) > 200 for part in parts):
        return "its name is too long"
    if kind and not stat.S_ISREG(kind):
        return "a link or another special file"
    if member.flag_bits & 1:
        return "encrypted"
    if member.file_size > MAX_PHOTO_MB * 1_000_000:
        return f"larger than {MAX_PHOTO_MB} MB"
    return ""


def _validate_size(size: int, archive: pathlib.Path, directory: pathlib.Path) -> None:
    """Checks the unpacked size that the zip announces; no member is read further than that."""
    if size > MAX_GB * 1_000_000_000:
        raise _error(f"its photos must take at most {MAX_GB} GB, got {size / 1e9:,.0f}; unpack it yourself")
    packed = archive.stat().st_size
    if size > max(_BOMB_GB * 1_000_000_000, _BOMB_RATIO * packed):
        problem = f"its {packed / 1e6:,.1f} MB would become {size / 1e9:,.1f} GB, as in a decompression bomb"
        raise _error(f"{problem}; unpack it yourself if you trust it")
    free = shutil.disk_usage(next(parent for parent in directory.absolute().parents if parent.is_dir())).free
    if size > free:
        raise _error(f"its photos need {size / 1e9:,.1f} GB, got {free / 1e9:,.1f} GB free in {directory.parent}")


def _extract(opened: zipfile.ZipFile, member: zipfile.ZipInfo, path: pathlib.Path) -> str:
    """Extracts a photo; returns the reason why it could not be, or ""."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with opened.open(member) as source, path.open("xb") as file:
            shutil.copyfileobj(source, file)  # at most `file_size` bytes, with the right checksum
        with contextlib.suppress(ValueError, OverflowError):  # an invalid date
            modified = time.mktime((*member.date_time, 0, 0, -1))
            os.utime(path, (modified, modified))
    except (FileExistsError, NotADirectoryError):
        return "another file of the zip has its place"
    except Exception as error:  # damaged bytes can make zipfile and its decompressors raise anything
        if isinstance(error, OSError) and error.errno is not None:  # an error of the disk
            raise
        path.unlink(missing_ok=True)
        return f"damaged ({first_line(error)})"
    return ""
