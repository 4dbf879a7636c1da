"""Photo cache: photos decoded and resized once, on all cores, and kept in shards on disk for later runs.

A cache folder holds numbered shards: `000000.npy` with the pixels of up to `SHARD` photos and `000000.json` with the
path, size and modification time of each file, its row and a checksum of its pixels, or the reason why it could not be
read.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from cib_jax.data import cache, photos
from cib_jax.data.dataset import Bar, Unreadable, no_bar
from cib_jax.errors import DataError
from cib_jax.files import count, map_in_order, read_json, replacing, short_reason, write_bytes

SHARD = 512
"""Photos per shard: an interrupted preparation loses at most these, and memory holds at most these."""

_FORMAT = 1
_OPEN_SHARDS = 64


class _FileStamp(NamedTuple):
    """Identity of a file version: two files with the same stamp have the same content."""

    path: str
    size: int
    mtime_ns: int


class _Decoded(NamedTuple):
    """Pixels of a photo, or the reason why it has none; "truncated" if it has not all."""

    pixels: UInt8[np.ndarray, "size size 3"] | None
    reason: str


class _Location(NamedTuple):
    """Location of a photo's pixels, or −1 and the reason why it has none; "truncated" if it has not all."""

    shard: int
    row: int
    reason: str
    checksum: int


@dataclasses.dataclass(frozen=True)
class PhotoCache:
    """The folder of all prepared photos, and how they are prepared: resized to squares of `size` pixels."""

    root: pathlib.Path
    size: int
    max_megapixels: int = photos.MAX_MEGAPIXELS
    bar: Bar = no_bar
    truncated: bool = False
    """Whether truncated JPEGs are decoded as far as they go."""

    def prepare(self, paths: Sequence[str], *, root: str, owner: str) -> "PreparedPhotos":
        """Decodes and resizes the photos that were not prepared before, and returns all readable ones.

        A file is identified by its path, size and modification time; a known one is not opened again, whether it was
        readable or not. The pixels depend on the file alone, not on the number of cores. An interrupted call is
        continued by the next one. If two processes prepare the same files, the second one waits. `owner` is the folder
        or list that the files belong to; each owner has a cache folder of its own.
        """
        key = {"owner": os.path.abspath(owner), "size": self.size, "max_megapixels": self.max_megapixels}
        key |= {"decoder": photos.VERSION, "format": _FORMAT} | ({"truncated": True} if self.truncated else {})
        folder = cache.key_folder(self.root, key)
        with cache.write_errors(folder, "prepared photos"):
            cache.create_folder(self.root, key)
            with cache.exclusive(folder, self.bar):
                return self._prepare(paths, root, folder)

    def _prepare(self, paths: Sequence[str], root: str, folder: pathlib.Path) -> "PreparedPhotos":
        known, notes = _read_shards(folder, self.size)
        files = [_stamp(root, path) for path in paths]
        new = [file for file in files if isinstance(file, _FileStamp) and file not in known]
        if new:
            size = len(new) * self.size * self.size * 3
            cache.validate_free_space(folder, size, "prepared photos", "lower --config.data.stored_size")
            if known:
                notes.append(f"Prepared before: {len(files) - len(new):,} of {count(len(files), 'photo')}")
            with self.bar("Preparing photos", len(new)) as advance:
                for shard in _batched(map_in_order(functools.partial(self._decode, root), new)):
                    known |= _append_shard(folder, shard)
                    advance(len(shard))
        used = {file: known[file] for file in files if isinstance(file, _FileStamp)}
        if not cache.in_use(folder):
            used = _compact(folder, self.size, known, used)
        kept, unreadable, locations, truncated = [], [], [], []
        digest = hashlib.blake2b(f"{self.size} {photos.VERSION}".encode(), digest_size=16)
        for index, file in enumerate(files):
            if isinstance(file, Unreadable):
                unreadable.append(file)
            elif (location := used[file]).row < 0:
                unreadable.append(Unreadable(file.path, location.reason))
            else:
                truncated += [file.path] if location.reason else []
                kept.append(index)
                locations.append(location)
                digest.update(json.dumps([*file, location.checksum]).encode())
        if truncated:
            notes.append(photos.truncated_note(truncated))
        images = CachedImages(folder, self.size, locations, f"photos-{digest.hexdigest()}")
        return PreparedPhotos(images, np.array(kept, np.int64), unreadable, notes)

    def _decode(self, root: str, file: _FileStamp) -> "_Decoded":
        path, reasons = os.path.join(root, file.path), set[str]()
        on_truncated = functools.partial(reasons.add, "truncated") if self.truncated else None
        try:
            pixels = photos.decode(path, self.size, max_megapixels=self.max_megapixels, on_truncated=on_truncated)
            return _Decoded(pixels, "".join(reasons))
        except photos.BadPhotoError as error:
            return _Decoded(None, str(error))


class PreparedPhotos(NamedTuple):
    """The readable photos, the indices of their paths (`kept`), and the other files, each with the reason."""

    images: "CachedImages"
    kept: Int[np.ndarray, " images"]
    unreadable: list[Unreadable]
    notes: list[str]


class CachedImages:
    """RGB squares in the shards of a cache folder; holds the folder's reader lock, so that none of them is deleted.

    Files are read, not mapped: pages of a map would count as memory of the process until they are evicted.
    """

    def __init__(self, folder: pathlib.Path, size: int, locations: Sequence[_Location], identity: str):
        """Opens the photos at `locations` in a cache folder."""
        self.identity = identity
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(cache.shared(folder))
        self._size = size
        self._folder = folder
        self._places = np.array([(place.shard, place.row, place.checksum) for place in locations], np.int64)
        self._open = functools.lru_cache(_OPEN_SHARDS)(functools.partial(_Shard, folder))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "size size 3"]:
        shard, row, checksum = self._places[index].tolist()
        file = self._open(shard)
        length = self._size * self._size * 3
        pixels = os.pread(file.descriptor, length, file.offset + row * length)
        _validate(pixels, checksum, self._folder, shard)
        return np.frombuffer(pixels, np.uint8).reshape(self._size, self._size, 3)


def _validate(pixels: Any, checksum: int, folder: pathlib.Path, number: int) -> None:
    # CRC-32, since each photo is checked whenever it is read: a cryptographic digest would take as long as decoding.
    if zlib.crc32(pixels) != checksum:
        path = _pixels_path(folder, number)
        raise DataError(
            f"{path}: the checksum of a prepared photo is wrong; remove {folder}, and the photos are prepared again",
            field=str(path),
        )


class _Shard:
    """The file of a shard, open for as long as this object is in use, and the offset of its pixels."""

    def __init__(self, folder: pathlib.Path, number: int):
        self.descriptor = os.open(_pixels_path(folder, number), os.O_RDONLY)
        # At the end of the process the system closes it: a thread may read until then.
        weakref.finalize(self, os.close, self.descriptor).atexit = False
        # The pixels follow the header, whose length is in its bytes 8 and 9. NumPy would parse it with `ast`, which now
        # and then fails in several threads of Python 3.11.7 or older: https://github.com/python/cpython/issues/106905
        self.offset = 10 + int.from_bytes(os.pread(self.descriptor, 2, 8), "little")


def _batched(results: Iterable[tuple[_FileStamp, _Decoded]]) -> Iterator[list[tuple[_FileStamp, _Decoded]]]:
    results = iter(results)
    while shard := list(itertools.islice(results, SHARD)):
        yield shard


def _stamp(root: str, path: str) -> _FileStamp | Unreadable:
    try:
        status = os.stat(os.path.join(root, path))
    except (OSError, ValueError) as error:  # ValueError: a list may name what no file can be called
        return Unreadable(path, short_reason(error))
    return _FileStamp(path, status.st_size, status.st_mtime_ns)


def _pixels_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{number:06}.npy"


def _shard_numbers(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit())


def _append_shard(folder: pathlib.Path, shard: list[tuple[_FileStamp, _Decoded]]) -> dict[_FileStamp, _Location]:
    """Writes a shard: first the pixels, which are valid only once their entries exist."""
    number = 1 + max(_shard_numbers(folder), default=-1)
    path = _pixels_path(folder, number)
    good: list[np.ndarray] = []
    locations = {}
    for stamp, (pixels, reason) in shard:
        row, checksum = (-1, 0) if pixels is None else (len(good), zlib.crc32(pixels.data))
        locations[stamp] = _Location(number, row, reason, checksum)
        good += [] if pixels is None else [pixels]
    with replacing(path) as part, part.open("wb") as file:
        np.save(file, np.stack(good) if good else np.zeros((0, 1, 1, 3), np.uint8))
    entries = [[*stamp, *location[1:]] for stamp, location in locations.items()]
    write_bytes(path.with_suffix(".json"), json.dumps([_digest(entries), entries]).encode())
    return locations


def _digest(entries: list[list[Any]]) -> str:
    return hashlib.blake2b(json.dumps(entries).encode(), digest_size=16).hexdigest()


def _read_shards(folder: pathlib.Path, size: int) -> tuple[dict[_FileStamp, _Location], list[str]]:
    """Returns the photos prepared before, and a note for each damaged shard, which is deleted."""
    known: dict[_FileStamp, _Location] = {}
    notes = []
    for number in _shard_numbers(folder):
        path = _pixels_path(folder, number)
        try:
            digest, entries = read_json(path.with_suffix(".json"))
            if digest != _digest(entries):
                raise ValueError("its entries have no checksum, or a wrong one")
            locations = {_FileStamp(*entry[:3]): _Location(number, *entry[3:]) for entry in entries}
            rows = sum(location.row >= 0 for location in locations.values())
            pixels = np.load(path, mmap_mode="r")  # checks the length of the file
            if pixels.dtype != np.uint8 or len(pixels) != rows or (rows and pixels.shape[1:] != (size, size, 3)):
                raise ValueError(f"its shape is {pixels.shape}, not that of {rows} photos of {size} pixels")
            known |= locations
        except Exception as error:  # NumPy raises errors of many types for a damaged header
            notes.append(f"{path} is damaged ({short_reason(error)}); its photos are prepared again")
            _delete_shard(folder, number)
    return known, notes


def _delete_shard(folder: pathlib.Path, number: int) -> None:
    path = _pixels_path(folder, number)
    path.with_suffix(".json").unlink(missing_ok=True)  # first, since pixels without entries are ignored
    path.unlink(missing_ok=True)


def _compact(
    folder: pathlib.Path, size: int, known: dict[_FileStamp, _Location], used: dict[_FileStamp, _Location]
) -> dict[_FileStamp, _Location]:
    """Deletes shards without a used photo, and rewrites the others if most of their photos are unused."""
    shards = {location.shard for location in used.values()}
    for number in {location.shard for location in known.values()} - shards:
        _delete_shard(folder, number)
    unused = sum(location.shard in shards for location in known.values()) - len(used)
    # Without space for a second copy, the first one stays as it is.
    if unused <= len(used) or len(used) * size * size * 3 > shutil.disk_usage(folder).free:
        return used
    load = functools.lru_cache(4)(lambda number: np.load(_pixels_path(folder, number), mmap_mode="r"))

    def read(place: _Location) -> _Decoded:
        if place.row < 0:
            return _Decoded(None, place.reason)
        pixels = np.array(load(place.shard)[place.row])
        _validate(pixels, place.checksum, folder, place.shard)
        return _Decoded(pixels, place.reason)

    moved: dict[_FileStamp, _Location] = {}
    for shard in _batched((stamp, read(place)) for stamp, place in used.items()):
        moved |= _append_shard(folder, shard)
    for number in shards:
        _delete_shard(folder, number)
    return moved
