"""An index of photos, opened for searching: its encoder, its codes, and what is known of each photo."""

import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from cib_jax import errors
from cib_jax.inference import serialization
from cib_jax.inference.hasher import Hasher
from cib_jax.models import weights
from cib_jax.retrieval.index import EXACT, Index
from cib_jax.storage import photo_table
from cib_jax.storage.photo_table import PhotoTable, Snapshot, key_of, path_of


class Photo(NamedTuple):
    """What an index knows of a photo."""

    id: str
    """16 hexadecimal digits, a digest of its path: the same as long as the path is."""
    path: str
    """Relative to the collection's root, or absolute."""
    size: int
    """Of the file, in bytes."""
    modified_ns: int
    """When the file was last changed before it was indexed, in nanoseconds since 1970."""
    width: int
    """Upright, in pixels."""
    height: int
    """The same."""
    thumbnail: bytes
    """A JPEG, its longer side at most `photos.THUMBNAIL` pixels; b"" where it was not asked for."""


class Hit(NamedTuple):
    """A photo that was found."""

    distance: int
    """From the query, in bits."""
    number: int
    """Which of the collection."""


class Collection:
    """The photos of an index and the encoder that made their codes. Any number of threads may search at once.

    collection = Collection.open("INDEX")
    hits = collection.nearest(collection.hasher.encode(squares), k=10)
    paths = [photo.path for photo in collection.photos([hit.number for hit in hits[0]])]

    Examples:
      >>> import cib_jax as cib
      >>> collection = cib.Collection.open("INDEX")  # of --mode=index
      >>> _, codes, _ = cib.encode_photos(collection.hasher, "PHOTOS/red.png")
      >>> (nearest,) = collection.nearest(codes, k=1)
      >>> [(photo.path, hit.distance) for photo, hit in zip(collection.photos([nearest[0].number]), nearest)]
      [('red.png', 0)]
    """

    def __init__(self, table: PhotoTable, snapshot: Snapshot, hasher: Hasher, index: Index | None):
        self._table, self._snapshot, self._index = table, snapshot, index
        self.hasher = hasher

    @classmethod
    def open(
        cls, uri: str | pathlib.Path, *, kind: str = EXACT, settings: Mapping[str, int] | None = None
    ) -> "Collection":
        """Returns the collection of an index as it is now.

        Args:
          uri: a folder, or what else LanceDB takes.
          kind: exact, or an approximate kind of `Index.of`.
          settings: of that kind.

        Raises:
          TableError: there is no index, or it cannot be read.
          SavedError: its encoder is damaged.
          SearchError: FAISS is not installed, or the kind or a setting is unknown.
        """
        table = PhotoTable.open(photo_table.place_of(uri))
        snapshot = table.snapshot()
        index = Index.of(snapshot.codes, kind, **settings or {}) if len(snapshot.codes) else None
        return cls(table, snapshot, hasher_of(table), index)

    def __len__(self) -> int:
        return len(self._snapshot.keys)

    @property
    def uri(self) -> str:
        """Where the index lies."""
        return self._table.uri

    @property
    def root(self) -> str:
        """The folder that the photos lie in, absolute."""
        return self._table.about.root

    @property
    def bits(self) -> int:
        """The length of a code."""
        return self.hasher.encoder.bits

    @property
    def side(self) -> int:
        """Side of the squares that `encode` takes, in pixels."""
        return self.hasher.side

    @property
    def codes(self) -> UInt8[np.ndarray, "photos bytes"]:
        """Of all photos, packed."""
        return self._snapshot.codes

    def renewed(self) -> "Collection":
        """Returns the collection as it is now, exact; itself, where nothing has changed.

        Raises:
          TableError: it cannot be read, or another index is in its place.
        """
        table = PhotoTable.open(self.uri)
        if table.about.encoder != self._table.about.encoder:
            raise errors.IndexFolderError(
                f"--index: {self.uri} was made anew by another encoder, so codes cannot be compared; open it again"
            )
        if table.about == self._table.about and table.version == self._snapshot.table.version:
            return self
        snapshot = table.snapshot()
        return Collection(table, snapshot, self.hasher, Index.of(snapshot.codes) if len(snapshot.codes) else None)

    def encode(self, squares: UInt8[np.ndarray, "n side side 3"]) -> UInt8[np.ndarray, "n bytes"]:
        """Returns the codes of photos that `data.photos` decoded to squares of `side` pixels."""
        return self.hasher.encode(squares)

    def nearest(self, codes: UInt8[np.ndarray, "queries bytes"], k: int) -> list[list[Hit]]:
        """Returns, for each code, its k nearest photos, or all if there are fewer, nearest first.

        Raises:
          ValueError: k is no whole number from 1 on, or the codes are not packed or of another length.
        """
        if self._index is None:
            return [[] for _ in codes]
        found = self._index.search(codes, min(k, len(self)) if k > 0 else k)
        rows = zip(*(side.tolist() for side in found), strict=True)
        # An approximate kind may find fewer than k.
        return [[Hit(*pair) for pair in zip(*row, strict=True) if pair[1] >= 0] for row in rows]

    def within(self, codes: UInt8[np.ndarray, "queries bytes"], radius: int) -> list[list[Hit]]:
        """Returns, for each code, all photos that differ in at most `radius` bits, nearest first.

        Raises:
          ValueError: the radius is negative, or the codes are not packed or of another length.
        """
        if self._index is None:
            return [[] for _ in codes]
        found = self._index.within(codes, radius)
        return [[Hit(*pair) for pair in zip(hits.distances.tolist(), hits.ids.tolist(), strict=True)] for hits in found]

    def reranked(self, logits: Float32[np.ndarray, "queries bits"], hits: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        """Returns the hits of each query by asymmetric distance, `Index.rerank`, which see.

        Raises:
          ValueError: the logits are not those of as many queries, or not finite.
        """
        if self._index is None or not any(hits):
            return [list(some) for some in hits]
        most = max(map(len, hits))
        ids = np.array([[hit.number for hit in some] + [-1] * (most - len(some)) for some in hits], np.int64)
        _, ordered = self._index.rerank(logits, ids)
        distance = [{hit.number: hit.distance for hit in some} for some in hits]
        return [
            [Hit(known[number], number) for number in row if number >= 0]
            for known, row in zip(distance, ordered.tolist(), strict=True)
        ]

    def groups(self, radius: int) -> list[list[int]]:
        """Returns groups of photos that chains of codes within `radius` bits join, of two or more, `Index.groups`.

        Raises:
          ValueError: the radius is negative.
        """
        return [members.tolist() for members in self._index.groups(radius)] if self._index else []

    def photos(self, numbers: Sequence[int], *, thumbnails: bool = True) -> list[Photo]:
        """Returns what is known of photos, in the order of `numbers`.

        Raises:
          TableError: it cannot be read.
        """
        columns = ["path", "raw_path", "size", "modified", "width", "height", *(["thumbnail"] if thumbnails else [])]
        rows = self._table.read(self._snapshot, numbers, columns)
        return [self._photo(number, rows[number]) for number in numbers]

    def number_of(self, id: str) -> int | None:
        """Returns which photo has this id; None: none has."""
        try:
            key = int.from_bytes(bytes.fromhex(id), "big", signed=True) if len(id) == 16 else None
        except ValueError:
            return None
        if key is None:
            return None
        place = int(np.searchsorted(self._snapshot.keys, key))
        return place if place < len(self) and self._snapshot.keys[place] == key else None

    def number_of_path(self, path: str) -> int | None:
        """Returns which photo has this path; None: none has."""
        return self.number_of(_id(key_of(path)))

    def _photo(self, number: int, row: dict[str, Any]) -> Photo:
        return Photo(
            _id(int(self._snapshot.keys[number])),
            path_of(row),
            row["size"],
            row["modified"],
            row["width"],
            row["height"],
            row.get("thumbnail", b""),
        )


def hasher_of(table: PhotoTable) -> Hasher:
    """Returns the encoder that made an index's codes.

    Raises:
      SavedError: it is damaged.
      TableError: it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / serialization.FILE).write_bytes(table.encoder())
        return Hasher.load(folder)


def file_of(hasher: Hasher) -> bytes:
    """Returns the encoder as an index keeps it."""
    with tempfile.TemporaryDirectory() as folder:
        hasher.save(folder)
        return (pathlib.Path(folder) / serialization.FILE).read_bytes()


def known_by(hasher: Hasher) -> dict[str, Any]:
    """Returns what codes are known by: those of encoders that agree in it can be compared."""
    encoder = hasher.encoder
    return {
        "backbone": encoder.backbone.name,
        "backbone_dtype": encoder.backbone_dtype,
        "bits": encoder.bits,
        "image_size": encoder.image_size,
        "side": hasher.side,
        "weights": weights.fingerprint({"trained": hasher.params, "frozen": hasher.frozen}),
    }


def _id(key: int) -> str:
    return key.to_bytes(8, "big", signed=True).hex()
