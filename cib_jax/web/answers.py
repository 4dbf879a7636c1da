"""From a collection to answers: what lies nearest to a photo, as plain dicts."""

import os
import re
import secrets
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from cib_jax.errors import UserError
from cib_jax.web.batching import Batches

MOST = 1000
"""Results of one answer."""

_ID = re.compile(r"[0-9a-f]{16}")


class Photo(Protocol):
    """What is known of an indexed photo; as `cib_jax.storage.collection.Photo`."""

    id: str
    path: str
    size: int
    modified_ns: int
    width: int
    height: int
    thumbnail: bytes


class Collection(Protocol):
    """What is searched; as `cib_jax.Collection`."""

    @property
    def root(self) -> str: ...  # noqa: D102
    @property
    def bits(self) -> int: ...  # noqa: D102
    @property
    def side(self) -> int: ...  # noqa: D102
    @property
    def codes(self) -> UInt8[np.ndarray, "n bytes"]: ...  # noqa: D102
    def __len__(self) -> int: ...
    def encode(self, squares: UInt8[np.ndarray, "n side side 3"], /) -> UInt8[np.ndarray, "n bytes"]: ...  # noqa: D102
    def nearest(self, codes: UInt8[np.ndarray, "q bytes"], k: int, /) -> Any: ...  # noqa: D102
    def photos(self, numbers: Any, /, *, thumbnails: bool = True) -> Any: ...  # noqa: D102
    def number_of(self, id: str, /) -> int | None: ...  # noqa: D102


class QueryError(UserError):
    """What is asked for makes no sense; the message is a sentence for whoever asked."""


class UnknownError(UserError):
    """There is no such photo."""


class Answers:
    """Answers about the collection of the moment. Any number of threads may ask. Close it."""

    def __init__(self, current: Callable[[], Collection]) -> None:
        """Compiles the encoder's programs, which takes a while.

        Args:
          current: the collection as it is now; its encoder is always the same.
        """
        self.current = current
        collection = current()
        self._batches = Batches(collection.encode, collection.side)

    def close(self) -> None:
        """Ends its thread."""
        self._batches.close()

    def photo(self, id: str, *, thumbnail: bool = False) -> Photo:
        """Returns what is known of a photo.

        Raises:
          UnknownError: there is none with this id.
        """
        collection = self.current()
        (photo,) = collection.photos([_number(collection, id)], thumbnails=thumbnail)
        return photo

    def by_id(self, id: str, k: int = 20, *, radius: int | None = None) -> dict[str, Any]:
        """Returns the photos nearest to an indexed one, itself among them.

        Raises:
          UnknownError: there is no such photo.
          QueryError: k or the radius is out of range.
        """
        collection = self.current()
        return _answer(collection, collection.codes[_number(collection, id)], k, radius, id)

    def by_code(self, code: str, k: int = 20, *, radius: int | None = None) -> dict[str, Any]:
        """Returns the photos nearest to a code, two hexadecimal digits a byte.

        Raises:
          QueryError: it is no such code, or k or the radius is out of range.
        """
        collection = self.current()
        digits = collection.bits // 4
        if not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", code):
            raise QueryError(f"code: wanted {digits} hexadecimal digits, for {collection.bits} bits.")
        return _answer(collection, np.frombuffer(bytes.fromhex(code), np.uint8), k, radius, None)

    def by_photo(
        self, square: UInt8[np.ndarray, "side side 3"], k: int = 20, *, radius: int | None = None
    ) -> dict[str, Any]:
        """Returns the photos nearest to a new one, cut to the collection's `side`.

        Raises:
          QueryError: k or the radius is out of range.
        """
        check(k, radius)
        return _answer(self.current(), self._batches.code(square), k, radius, None)

    def random(self, k: int = 20, *, radius: int | None = None) -> dict[str, Any]:
        """Returns the answer for an indexed photo drawn by chance.

        Raises:
          UnknownError: there is no photo at all.
          QueryError: k or the radius is out of range.
        """
        check(k, radius)
        collection = self.current()
        if not len(collection):
            raise UnknownError("There is no photo in the index yet.")
        number = secrets.randbelow(len(collection))
        (photo,) = collection.photos([number], thumbnails=False)
        return _answer(collection, collection.codes[number], k, radius, photo.id)


def _number(collection: Collection, id: str) -> int:
    number = collection.number_of(id) if _ID.fullmatch(id) else None
    if number is None:
        raise UnknownError("There is no photo with this id.")
    return number


def _answer(
    collection: Collection, code: UInt8[np.ndarray, " bytes"], k: int, radius: int | None, id: str | None
) -> dict[str, Any]:
    check(k, radius)
    # Those within the radius are the first of the nearest: asked for alone, they could be all photos at once.
    hits = collection.nearest(code[None], min(k, len(collection)))[0] if len(collection) else []
    hits = [hit for hit in hits if radius is None or hit.distance <= radius]
    photos = collection.photos([hit.number for hit in hits], thumbnails=False) if hits else []
    return {
        "query": {"id": id, "code": code.tobytes().hex()},
        "bits": collection.bits,
        "results": [
            {
                "id": photo.id,
                "path": shown(photo.path),
                "distance": int(hit.distance),
                "code": collection.codes[hit.number].tobytes().hex(),
                "width": photo.width,
                "height": photo.height,
                "thumbnail": f"/thumbnail/{photo.id}",
                "image": f"/image/{photo.id}",
            }
            for hit, photo in zip(hits, photos, strict=True)
        ],
    }


def shown(path: str) -> str:
    """Returns a path as text that any encoding takes: bytes that are no UTF-8 become a replacement character."""
    return os.fsencode(path).decode("utf-8", "replace")


def check(k: int, radius: int | None) -> None:
    """Checks how much is asked for.

    Raises:
      QueryError: it is out of range.
    """
    if not 1 <= k <= MOST:
        raise QueryError(f"k: wanted a whole number from 1 to {MOST}, got {k}.")
    if radius is not None and radius < 0:
        raise QueryError(f"radius: wanted a whole number of bits, 0 or more, got {radius}.")
