"""Photos decoded and resized once, on all cores, and kept on disk, where later starts find them."""

import fcntl
import functools
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from cib_jax.data import photos
from cib_jax.data.cache import alone, hold, in_use
from cib_jax.data.dataset import Bar, Unreadable, no_bar
from cib_jax.errors import DataError
from cib_jax.files import map_in_order

SHARD = 512
"""Photos in a file: what an interrupted preparation can lose, and what is held in memory."""

_FORMAT = 1
_OPEN_SHARDS = 64


class _Stamp(NamedTuple):
    """What a file is known by."""

    path: str
    size: int
    mtime_ns: int


class _Place(NamedTuple):
    """Where a photo's pixels lie, or why there are none."""

    shard: int
    row: int
    reason: str


class Prepared(NamedTuple):
    """What came of some files."""

    images: "PreparedPhotos"
    kept: Int[np.ndarray, " images"]
    """Which of the files became images, in order."""
    unreadable: list[Unreadable]
    notes: list[str]


class PreparedPhotos:
    """Squares of RGB out of files: what is looked at is read, the rest stays on disk.

    Read, not mapped: pages of a map count as the process's memory for as long as nobody else wants them.
    """

    def __init__(self, folder: pathlib.Path, size: int, places: Sequence[_Place], identity: str):
        """Shows the photos at `places` of the shards in `folder`, which stays as it is meanwhile."""
        self.identity = identity
        self._used = hold(folder, fcntl.LOCK_SH)
        self._size = size
        self._shards = np.array([place.shard for place in places], np.int64)
        self._rows = np.array([place.row for place in places], np.int64)
        self._shard = functools.lru_cache(_OPEN_SHARDS)(functools.partial(_open_shard, folder))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "size size 3"]:
        file, start = self._shard(int(self._shards[index]))
        length = self._size * self._size * 3
        pixels = os.pread(file.fileno(), length, start + int(self._rows[index]) * length)
        return np.frombuffer(pixels, np.uint8).reshape(self._size, self._size, 3)


def _open_shard(folder: pathlib.Path, number: int) -> tuple[IO[bytes], int]:
    """Returns a shard, open, and where its pixels begin."""
    path = _pixels(folder, number)
    return path.open("rb"), np.load(path, mmap_mode="r").offset


def prepare(
    paths: Sequence[str],
    *,
    root: str,
    owner: str,
    size: int,
    cache: pathlib.Path,
    max_megapixels: int = photos.MAX_MEGAPIXELS,
    bar: Bar = no_bar,
) -> Prepared:
    """Decodes and resizes what was not prepared before, and returns all photos that can be read.

    A file is known by its path, size and time of change; a known one is not opened again, whether it was good or bad.
    The pixels depend on the file alone, not on the number of cores. An interrupted call is gone on with by the next.
    Of two processes that prepare the same files, the second waits.

    Args:
      paths: of the files, relative to `root` or absolute, each once.
      root: the folder.
      owner: what the files belong to, a folder or a list: another owner's are kept apart.
      size: side of the squares in pixels.
      cache: the folder in which all prepared photos are kept.
      max_megapixels: larger photos are unreadable.
      bar: shows the progress.

    Raises:
      DataError: the cache cannot be written, or the disk is too small.
    """
    made_of = {
        "owner": os.path.abspath(owner),
        "size": size,
        "max_megapixels": max_megapixels,
        "decoder": photos.VERSION,
        "format": _FORMAT,
    }
    text = json.dumps(made_of, sort_keys=True, indent=2)
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:24]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "made_of.json", text.encode())
        with alone(folder, bar):
            return _prepare(paths, root, size, folder, max_megapixels, bar)
    except OSError as error:
        raise DataError(
            f"config.cache.dir: prepared photos cannot be kept in {folder} ({error.strerror or error}); make room or "
            "name another place by --config.cache.dir=DIR, what was prepared is kept"
        ) from error


def _prepare(
    paths: Sequence[str], root: str, size: int, folder: pathlib.Path, max_megapixels: int, bar: Bar
) -> Prepared:
    known, notes = _read(folder, size)
    found: list[_Stamp | Unreadable] = [_stamp(root, path) for path in paths]
    new = [stamp for stamp in found if isinstance(stamp, _Stamp) and stamp not in known]
    if new:
        validate_free_space(
            folder, len(new) * size * size * 3, "photos take", "lower --config.data.stored_size or name"
        )
        if known:
            notes.append(f"{len(found) - len(new):,} of {len(found):,} photos were prepared before")

        def decoded(stamp: _Stamp) -> UInt8[np.ndarray, "size size 3"] | str:
            try:
                return photos.decode(os.path.join(root, stamp.path), size, max_megapixels=max_megapixels)
            except photos.BadPhotoError as error:
                return str(error)

        with bar("Preparing photos", len(new)) as moved:
            for shard in _shards(map_in_order(decoded, new)):
                known |= _append(folder, shard)
                moved(len(shard))
    live = {stamp: known[stamp] for stamp in found if isinstance(stamp, _Stamp)}
    if not in_use(folder):
        live = _tidy(folder, size, known, live)
    kept, unreadable, places = [], [], []
    digest = hashlib.blake2b(f"{size} {photos.VERSION}".encode(), digest_size=16)
    for index, stamp in enumerate(found):
        if isinstance(stamp, Unreadable):
            unreadable.append(stamp)
        elif (place := live[stamp]).reason:
            unreadable.append(Unreadable(stamp.path, place.reason))
        else:
            kept.append(index)
            places.append(place)
            digest.update(json.dumps(stamp).encode())
    images = PreparedPhotos(folder, size, places, f"photos-{digest.hexdigest()}")
    return Prepared(images, np.array(kept, np.int64), unreadable, notes)


def _shards(results: Iterable[tuple[_Stamp, Any]]) -> Iterator[list[tuple[_Stamp, Any]]]:
    shard: list[tuple[_Stamp, Any]] = []
    for result in results:
        shard.append(result)
        if len(shard) == SHARD:
            yield shard
            shard = []
    if shard:
        yield shard


def _stamp(root: str, path: str) -> _Stamp | Unreadable:
    try:
        found = os.stat(os.path.join(root, path))
    except OSError as error:
        return Unreadable(path, (error.strerror or str(error)).lower())
    return _Stamp(path, found.st_size, found.st_mtime_ns)


def _pixels(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{number:06}.npy"


def _entries(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{number:06}.json"


def _write(path: pathlib.Path, content: bytes) -> None:
    part = path.with_suffix(f".{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _append(folder: pathlib.Path, shard: list[tuple[_Stamp, Any]]) -> dict[_Stamp, _Place]:
    """Writes a shard, pixels first: its entries make it count."""
    number = 1 + max((int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()), default=-1)
    good = [pixels for _, pixels in shard if not isinstance(pixels, str)]
    part = folder / f"{number:06}.{secrets.token_hex(4)}.part"
    try:
        with part.open("wb") as file:
            np.save(file, np.stack(good) if good else np.zeros((0, 1, 1, 3), np.uint8))
        os.replace(part, _pixels(folder, number))
    finally:
        part.unlink(missing_ok=True)
    places, row = {}, 0
    for stamp, pixels in shard:
        bad = isinstance(pixels, str)
        places[stamp] = _Place(number, -1 if bad else row, pixels if bad else "")
        row += not bad
    _write(_entries(folder, number), json.dumps([[*stamp, *place[1:]] for stamp, place in places.items()]).encode())
    return places


def _read(folder: pathlib.Path, size: int) -> tuple[dict[_Stamp, _Place], list[str]]:
    """Returns what was prepared before, and a sentence for each damaged shard, which is deleted."""
    known: dict[_Stamp, _Place] = {}
    notes = []
    for path in sorted(folder.glob("*.json")):
        if not path.stem.isdigit():
            continue
        number = int(path.stem)
        try:
            entries = {
                _Stamp(*entry[:3]): _Place(number, *entry[3:]) for entry in json.loads(path.read_text(encoding="utf-8"))
            }
            rows = sum(not place.reason for place in entries.values())
            pixels = np.load(_pixels(folder, number), mmap_mode="r")  # checks the file's length
            if pixels.dtype != np.uint8 or len(pixels) != rows or (rows and pixels.shape[1:] != (size, size, 3)):
                raise ValueError(f"it holds {pixels.shape}, not {rows} photos of {size} pixels")
            known |= entries
        except (OSError, ValueError, TypeError) as error:
            notes.append(f"{_pixels(folder, number)} is damaged ({error}); its photos are prepared again")
            _delete(folder, number)
    return known, notes


def _delete(folder: pathlib.Path, number: int) -> None:
    _entries(folder, number).unlink(missing_ok=True)  # first: without them the pixels count for nothing
    _pixels(folder, number).unlink(missing_ok=True)


def _tidy(
    folder: pathlib.Path, size: int, known: dict[_Stamp, _Place], live: dict[_Stamp, _Place]
) -> dict[_Stamp, _Place]:
    """Deletes shards of which no photo is left, and rewrites all when most rows are of photos that are gone."""
    used = {place.shard for place in live.values()}
    for number in {place.shard for place in known.values()} - used:
        _delete(folder, number)
    dead = sum(place.shard in used for place in known.values()) - len(live)
    # Where there is no room for a second copy, the first one stays: nothing is wrong with it.
    if dead <= len(live) or len(live) * size * size * 3 > shutil.disk_usage(folder).free:
        return live
    old = functools.lru_cache(4)(lambda number: np.load(_pixels(folder, number), mmap_mode="r"))
    moved: dict[_Stamp, _Place] = {}
    rows = ((stamp, place.reason or np.array(old(place.shard)[place.row])) for stamp, place in live.items())
    for shard in _shards(rows):
        moved |= _append(folder, shard)
    for number in used:
        _delete(folder, number)
    return moved


def validate_free_space(folder: pathlib.Path, needed: int, what: str, way_out: str) -> None:
    """Checks that so many bytes fit on the disk of `folder`.

    Raises:
      DataError: they do not; the message says what they are and what can be done beside naming another place.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"config.cache.dir: the prepared {what} {needed / 2**30:.1f} GiB, but {folder} has {free / 2**30:.1f} "
            f"GiB free; {way_out} another place by --config.cache.dir=DIR"
        )
