"""From photos on disk to packed codes, for a loop of one's own: a folder, some files, or one."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from cib_jax.data import items
from cib_jax.data.items import Photos
from cib_jax.hashing.hasher import Hasher


class PhotoCodes(NamedTuple):
    """Codes of photos, and which these are."""

    paths: list[str]
    codes: UInt8[np.ndarray, "photos bytes"]
    unreadable: list[tuple[str, str]]
    """Paths of the others, and why they cannot be read."""


def encode_photos(hasher: Hasher, photos: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> PhotoCodes:
    """Returns the packed codes of photos, decoded on all cores while others are encoded.

    hasher = cib_jax.Hasher.load("runs/photos")
    paths, codes, unreadable = cib_jax.encode_photos(hasher, "PHOTOS")

    Args:
      hasher: trained on images.
      photos: a folder, which is looked through with all folders in it, in the order of paths; a photo; or several.

    Raises:
      ValueError: the hasher was trained on features.
      DataError: there is no such file, the folder holds no photos, or they cannot be reached any more.

    Examples:
      >>> import os
      >>> import cib_jax as cib
      >>> hasher = cib.Hasher.load("RUN")
      >>> paths, codes, unreadable = cib.encode_photos(hasher, "PHOTOS")
      >>> [os.path.basename(path) for path in paths], codes.shape, len(unreadable)
      (['blue.png', 'green.png', 'red.png'], (3, 2), 0)
    """
    if hasher.encoder.backbone.takes != "images":
        raise ValueError("hasher: it was trained on features; pass those to its encode")
    with items.asked_for_as("photos"):
        return _encoded(hasher, _found(photos, hasher.side))


def _encoded(hasher: Hasher, found: Photos) -> PhotoCodes:
    paths: list[str] = []
    unreadable: list[tuple[str, str]] = []

    def batches() -> Iterator[UInt8[np.ndarray, "batch side side 3"]]:
        batch = []
        for number, read in found.read([range(len(found.names))]):
            path = os.path.join(found.root, found.names[number])
            if read.content is None:
                unreadable.append((path, read.reason))
                continue
            paths.append(path)
            batch.append(read.content)
            if len(batch) == hasher.batch_size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    codes = hasher.encode_batches(batches(), size=hasher.batch_size)
    return PhotoCodes(paths, codes, unreadable)


def _found(photos: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], side: int) -> Photos:
    if not isinstance(photos, str | os.PathLike):
        paths = [os.path.abspath(path) for path in photos]
        return Photos("the list", paths, os.sep, side)
    place = os.path.abspath(os.path.expanduser(photos))
    if os.path.isfile(place) and not place.lower().endswith(items.LISTS):
        return Photos(place, [os.path.basename(place)], os.path.dirname(place), side)
    found = items.find(place, takes="images", size=side)
    assert isinstance(found, Photos)
    return found
