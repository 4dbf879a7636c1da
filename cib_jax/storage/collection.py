"""Index of photos, opened for searching: its encoder, its codes, and the metadata of each photo."""

import contextlib
import datetime
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from jaxtyping import Float32, Int8, UInt8

from cib_jax import errors
from cib_jax.files import count, short_reason
from cib_jax.retrieval.index import EXACT, Index
from cib_jax.storage import photo_table
from cib_jax.storage.photo_table import PhotoTable
from cib_jax.storage.rows import path_of
from cib_jax.storage.search_copy import SearchCopy

if TYPE_CHECKING:  # Flax takes a second to import, which a search in a `SearchCopy` does not need
    from cib_jax.inference.hasher import Hasher

KEPT = 100_000
"""Number of photos whose metadata, without the thumbnail, is kept in memory once it was read."""


class Photo(NamedTuple):
    """Metadata of an indexed photo."""

    id: str
    """16 hexadecimal digits, a digest of the path."""
    path: str
    """Path relative to the collection's root, or absolute."""
    size: int
    """Size of the file in bytes."""
    modified_ns: int
    """Time of the file's last change before it was indexed, in nanoseconds since 1970."""
    width: int
    height: int
    """Width and height in pixels, upright."""
    thumbnail: bytes = b""
    """A JPEG, its longer side at most `photos.THUMBNAIL` pixels; b"" if not requested."""
    digest: str = ""
    """SHA-256 of the file in hexadecimal digits; "" but for duplicates of equal size."""

    def __repr__(self) -> str:
        return f"Photo({self.path!r}, {self.width} × {self.height}, {self.size:,} bytes, id={self.id!r})"


class Hit(NamedTuple):
    """A photo that was found."""

    distance: int
    """Distance from the query in bits."""
    number: int
    """Position in the collection."""


class Collection:
    """The photos of an index and the encoder that made their codes. Any number of threads may search at once.

    hits = Collection.open("INDEX").nearest(codes, k=10)
    """

    uri: str
    """Place of the index."""
    root: str
    """Absolute path of the folder of photos."""
    bits: int
    """Number of bits of a code."""
    side: int
    """Side in pixels of the squares that `encode` takes."""
    codes: UInt8[np.ndarray, "photos bytes"]
    """Packed codes of all photos."""

    def __init__(
        self,
        table: PhotoTable | SearchCopy,
        hasher: "Hasher | None",
        kind: str,
        settings: Mapping[str, int],
        snapshot: photo_table.Snapshot | None = None,
    ):
        self._table, self._hasher, self._kind, self._settings = table, hasher, kind, settings
        self._snapshot = table.snapshot() if snapshot is None else snapshot
        self.uri, self.root, self.codes = table.uri, table.metadata.root, self._snapshot.codes
        self.bits, self.side = table.metadata.encoder["bits"], table.metadata.encoder["side"]
        self._index = Index.of(self.codes, kind, progress=True, **settings) if len(self.codes) else None
        self._known: dict[int, Photo] = {}  # read before, by number, without thumbnails

    @classmethod
    def open(
        cls,
        uri: str | pathlib.Path,
        *,
        kind: str = EXACT,
        settings: Mapping[str, int] | None = None,
        for_one: bool = False,
    ) -> Self:
        """Returns the collection of an index as it is now.

        Args:
          uri: A folder, or another place that LanceDB supports.
          kind: Kind of the search: exact, or an approximate kind of `Index.of`.
          settings: Settings of that kind.
          for_one: Whether it is opened to search for one photo, without thumbnails, which a copy of the index makes
            possible in less time.

        Raises:
          IndexFolderError: There is no index, or it cannot be read.
          SavedHasherError: Its encoder is damaged.
          SearchError: FAISS is not installed, or the kind or a setting is unknown.
        """
        uri = photo_table.normalize_uri(uri)
        copy = SearchCopy.open(uri) if for_one and photo_table.is_local(uri) else None
        if copy is not None:
            return cls(copy, None, kind, settings or {})
        table = PhotoTable.open(uri)
        return cls(table, load_hasher(table), kind, settings or {})

    @property
    def hasher(self) -> "Hasher":
        """Encoder of the codes."""
        if self._hasher is None:
            self._hasher = load_hasher(self._table)
        return self._hasher

    def __len__(self) -> int:
        return len(self._snapshot.keys)

    def __repr__(self) -> str:
        return f"Collection({count(len(self), 'photo')} of {self.root}, codes of {self.bits} bits)"

    def filtered(self, *, folder: str = "", after: str = "", before: str = "") -> Self:
        """Returns the collection of the photos in one folder and from one time.

        Args:
          folder: Folder, relative to the root or absolute, with its subfolders; "" for all.
          after: Day from which on the files were last changed, in local time, as "2024-12-31", "2024-12" or "2024"; ""
            for any.
          before: Day before which they were last changed; "" for any.

        Raises:
          SearchError: A date is invalid, or there are no such photos.
        """
        if not (folder or after or before):
            return self
        paths, times = self._table.paths_and_times(self._snapshot)
        kept = (times >= _nanoseconds("after", after)) & (times < _nanoseconds("before", before))
        if folder:
            prefix = os.path.join(os.path.normpath(os.path.join(self.root, os.path.expanduser(folder))), "")
            inside = (os.path.normpath(os.path.join(self.root, path)).startswith(prefix) for path in paths)
            kept &= np.fromiter(inside, bool, len(paths))
        if not kept.any():
            given = {"--folder": folder, "--after": after, "--before": before}
            flags = [f"{flag}={value}" for flag, value in given.items() if value]
            problem = f"{' '.join(flags)} must leave some of the {len(self):,} photos of {self.root}, got none"
            raise errors.SearchError(f"{problem}; give another folder or date", field=flags[0].partition("=")[0])
        return type(self)(
            self._table, self._hasher, self._kind, self._settings, self._snapshot.take(np.flatnonzero(kept))
        )

    def renewed(self) -> Self:
        """Returns the collection as it is now, with exact search; itself if nothing has changed.

        Raises:
          IndexFolderError: It cannot be read, or there is another index in its place.
        """
        table = PhotoTable.open(self.uri)
        if table.metadata.encoder != self._table.metadata.encoder:
            message = (
                f"--index: {self.uri} was made anew by another encoder, so codes cannot be compared; open it again"
            )
            raise errors.IndexFolderError(message, field="--index")
        before = self._table
        if isinstance(before, PhotoTable) and (table.metadata, table.created, table.version) == (
            before.metadata,
            before.created,
            self._snapshot.table.version,
        ):
            return self
        return type(self)(table, self.hasher, EXACT, {})

    def encode(self, squares: UInt8[np.ndarray, "n side side 3"]) -> UInt8[np.ndarray, "n bytes"]:
        """Returns the codes of photos that `data.photos` decoded to squares of `side` pixels."""
        return self.hasher.encode(squares)

    def encode_with_features(
        self, squares: UInt8[np.ndarray, "n side side 3"], *, size: int = 0
    ) -> tuple[UInt8[np.ndarray, "n bytes"], Int8[np.ndarray, "n features"]]:
        """Returns the codes of `encode`, and features for `reranked_by_features`; `size` is that of a batch, or 0."""
        if isinstance(self._table, SearchCopy) and len(squares) == 1:
            with contextlib.suppress(errors.ExportedError):  # not for this kind of device
                return self._table.encode_with_features(squares)
        return self.hasher.encode_with_features([squares], size=size)

    def nearest(self, codes: UInt8[np.ndarray, "queries bytes"], k: int) -> list[list[Hit]]:
        """Returns, for each code, its k nearest photos, or all if there are fewer, nearest first.

        Raises:
          UserError: k is less than 1, or the codes are not packed or of another length.
        """
        if self._index is None:
            return [[] for _ in codes]
        found = self._index.search(codes, min(k, len(self)) if k > 0 else k)
        rows = zip(*(side.tolist() for side in found), strict=True)
        # An approximate kind may find fewer than k, with id −1 for the rest.
        return [[Hit(*pair) for pair in zip(*row, strict=True) if pair[1] >= 0] for row in rows]

    def within(self, codes: UInt8[np.ndarray, "queries bytes"], radius: int) -> list[list[Hit]]:
        """Returns, for each code, all photos that differ in at most `radius` bits, nearest first.

        Raises:
          UserError: The radius is negative, or the codes are not packed or of another length.
        """
        if self._index is None:
            return [[] for _ in codes]
        found = self._index.within(codes, radius)
        return [[Hit(*pair) for pair in zip(hits.distances.tolist(), hits.ids.tolist(), strict=True)] for hits in found]

    def reranked(self, logits: Float32[np.ndarray, "queries bits"], hits: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        """Returns the hits of each query by asymmetric distance, the sum of |logit| over the bits that differ.

        Args:
          logits: Logits of the queries, as from `Hasher.logits`.
          hits: Hits of each query.

        Raises:
          SearchError: There is not one row of logits for each query, or they are not finite.
        """
        if self._index is None or not any(hits):
            return [list(some) for some in hits]
        most = max(map(len, hits))
        ids = np.array([[hit.number for hit in some] + [-1] * (most - len(some)) for some in hits], np.int64)
        _, ordered = self._index.rerank(logits, ids)
        distances = [{hit.number: hit.distance for hit in some} for some in hits]
        return [
            [Hit(distance[number], number) for number in row if number >= 0]
            for distance, row in zip(distances, ordered.tolist(), strict=True)
        ]

    @property
    def has_features(self) -> bool:
        """Whether the index holds features for `reranked_by_features`; one of an earlier version does not."""
        return self._table.has_features

    def reranked_by_features(
        self, features: Int8[np.ndarray, "queries features"], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        """Returns the hits of each query by the cosine of its features and theirs, the largest first.

        Args:
          features: Quantized features of the queries, as from `Hasher.features`.
          hits: Hits of each query.
        """
        held = self._table.read(self._snapshot, list({hit.number for some in hits for hit in some}), ["feature"])
        ordered: list[list[Hit]] = []
        for query, some in zip(features.astype(np.float32), hits, strict=True):
            if not some:
                ordered.append([])
                continue
            # Rows of zeros, as for photos that an earlier version indexed, come last but for negative cosines.
            features_of = (held[hit.number]["feature"] or bytes(len(query)) for hit in some)
            rows = np.stack([np.frombuffer(feature, np.int8) for feature in features_of]).astype(np.float32)
            cosines = rows @ query / np.maximum(np.linalg.norm(rows, axis=1), 1)
            ordered.append([some[place] for place in np.argsort(-cosines, kind="stable")])
        return ordered

    def groups(self, radius: int) -> list[list[int]]:
        """Returns the groups of two or more photos that are joined by chains of codes within `radius` bits.

        Raises:
          UserError: The radius is negative.
        """
        return [members.tolist() for members in self._index.groups(radius)] if self._index else []

    def photos(self, numbers: Sequence[int], *, thumbnails: bool = True) -> list[Photo]:
        """Returns the metadata of photos, in the order of `numbers`."""
        # A read by LanceDB takes milliseconds, ten times as long as a search.
        known = {} if thumbnails else self._known
        found = {number: known[number] for number in numbers if number in known}
        columns = ["size", "modified", "width", "height", *(["thumbnail"] if thumbnails else [])]
        missing = [number for number in numbers if number not in found]
        for number, row in self._table.read(self._snapshot, missing, ["path", "raw_path", *columns]).items():
            id = int(self._snapshot.keys[number]).to_bytes(8, "big", signed=True).hex()
            found[number] = Photo(id, path_of(row), *(row[column] for column in columns))
        if not thumbnails and len(found) <= KEPT:
            if len(known) > KEPT:
                known = self._known = {}
            known.update(found)
        return [found[number] for number in numbers]

    def number_of(self, id: str) -> int | None:
        """Returns the position of the photo with this id, or None if there is none."""
        if not re.fullmatch("[0-9a-fA-F]{16}", id):
            return None
        key = int.from_bytes(bytes.fromhex(id), "big", signed=True)
        place = int(np.searchsorted(self._snapshot.keys, key))
        return place if place < len(self) and self._snapshot.keys[place] == key else None


def _nanoseconds(name: str, date: str) -> int:
    """Returns the start of a day, month or year in local time, in nanoseconds since 1970; "" is the end of time."""
    if not date:
        return -(2**63) if name == "after" else 2**63 - 1
    try:
        if not re.fullmatch(r"\d{4}(-\d\d){0,2}", date):
            raise ValueError
        day = datetime.datetime.strptime(date + "0000-01-01"[len(date) :], "%Y-%m-%d")
        return int(day.timestamp()) * 1_000_000_000
    except (ValueError, OverflowError, OSError):
        problem = f"--{name} must be a day, a month or a year, got {date!r}; try 2024-12-31, 2024-12 or 2024"
        raise errors.SearchError(problem, field=f"--{name}") from None


def load_hasher(table: PhotoTable | SearchCopy) -> "Hasher":
    """Returns the encoder that made an index's codes."""
    from cib_jax.inference import serialization
    from cib_jax.inference.hasher import Hasher

    content = table.encoder()
    try:
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / serialization.FILE).write_bytes(content)
            hasher = Hasher.load(folder)
    except errors.SavedHasherError as error:
        fault = str(error).partition(f"{serialization.FILE} ")[2] or str(error)
        raise errors.SavedHasherError(f"--index: the encoder of {table.uri} {fault}", field="--index") from error
    except OSError as error:
        message = (
            f"the folder of temporary files cannot be used ({short_reason(error)}); free some space, or set TMPDIR"
        )
        raise errors.IndexFolderError(f"--index: {message}", field="--index") from error
    if hasher.encoder.bits != table.metadata.encoder["bits"]:
        message = (
            f"--index: {table.uri} is damaged, its codes have {table.metadata.encoder['bits']} bits and those of its "
            f"encoder {hasher.encoder.bits}; index the photos again in another folder"
        )
        raise errors.IndexFolderError(message, field="--index")
    return hasher


def hasher_bytes(hasher: "Hasher") -> bytes:
    """Returns the content of the file in which an index keeps its encoder."""
    from cib_jax.inference import serialization

    with tempfile.TemporaryDirectory() as folder:
        hasher.save(folder)
        return (pathlib.Path(folder) / serialization.FILE).read_bytes()


def encoder_identity(hasher: "Hasher") -> dict[str, Any]:
    """Returns the identity of an encoder: codes of encoders with the same one can be compared."""
    from cib_jax.models import weights

    encoder = hasher.encoder
    return {
        "backbone": encoder.backbone.name,
        "backbone_dtype": encoder.backbone_dtype,
        "bits": encoder.bits,
        "image_size": encoder.image_size,
        "side": hasher.side,
        "weights": weights.fingerprint({"trained": hasher.params, "frozen": hasher.frozen}),
    }
