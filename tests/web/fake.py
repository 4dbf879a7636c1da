"""A small collection, searched by a plain loop, with a fixed random projection as its encoder."""

import hashlib
import io
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image

from cib_jax.data import photos

SIDE, BITS = 16, 64


class Photo(NamedTuple):
    id: str
    path: str
    size: int
    modified_ns: int
    width: int
    height: int
    thumbnail: bytes


class Hit(NamedTuple):
    distance: int
    number: int


class FakeCollection:
    side, bits = SIDE, BITS

    def __init__(self, root: pathlib.Path):
        self.root = str(root)
        self._planes = np.random.default_rng(0).normal(size=(SIDE * SIDE * 3, BITS)).astype(np.float32)
        self.indexed, squares = [], []
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            name, found = os.path.relpath(path, root), path.stat()
            seen = photos.decode_with_thumbnail(path, SIDE)
            id = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
            known = (found.st_size, found.st_mtime_ns, seen.width, seen.height, seen.thumbnail)
            self.indexed.append(Photo(id, name, *known))
            squares.append(seen.square)
        self._numbers = {photo.id: number for number, photo in enumerate(self.indexed)}
        self.batches: list[int] = []
        """Size of each batch that was encoded."""
        self.encoding = threading.Lock()
        """Held while a batch is encoded."""
        self.arrived = threading.Semaphore(0)
        """Released when a batch arrives, before it waits for the lock."""
        self.codes = self.encode(np.stack(squares)) if squares else np.zeros((0, BITS // 8), np.uint8)

    def __len__(self) -> int:
        return len(self.indexed)

    def encode(self, squares: np.ndarray) -> np.ndarray:
        self.arrived.release()
        with self.encoding:
            self.batches.append(len(squares))
            flat = squares.reshape(len(squares), -1).astype(np.float32) - 127
            return np.packbits(np.stack([row @ self._planes > 0 for row in flat]), axis=1)

    def nearest(self, codes: np.ndarray, k: int) -> list[list[Hit]]:
        return [nearest(self.codes, code)[:k] for code in codes]

    def photos(self, numbers: Sequence[int], *, thumbnails: bool = True) -> list[Photo]:
        found = [self.indexed[number] for number in numbers]
        return found if thumbnails else [photo._replace(thumbnail=b"") for photo in found]

    def number_of(self, id: str) -> int | None:
        return self._numbers.get(id)


def nearest(codes: np.ndarray, query: np.ndarray) -> list[Hit]:
    """Returns all codes by distance, counted bit by bit."""
    found = []
    for number, code in enumerate(codes):
        bits = zip(np.unpackbits(code), np.unpackbits(query), strict=True)
        found.append(Hit(sum(int(a != b) for a, b in bits), number))
    return sorted(found)


def picture(seed: int, width: int = 60, height: int = 40) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, form: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, form, **settings)
    return file.getvalue()


def fill(root: pathlib.Path, count: int = 20) -> None:
    """Writes photos into folders, with a place and a comment in their metadata."""
    for number in range(count):
        folder = root / f"f{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        exif = PIL.Image.Exif()
        exif.get_ifd(0x8825)[1] = "N"
        exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
        exif[0x010E] = "SECRET-PLACE"
        (folder / f"{number}.jpg").write_bytes(
            encoded(picture(number, 300 + number, 200), "JPEG", exif=exif.tobytes(), comment=b"SECRET-WORDS")
        )
