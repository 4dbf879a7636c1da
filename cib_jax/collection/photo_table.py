"""Which photos are indexed and what is kept of each: a LanceDB table, and beside it the encoder that made the codes.

The first table, `encoder`, has one row: what the index is known by, and the encoder as `Hasher.save` writes it. The
second, `photos`, has a row for each photo, under a digest of its path. That key is declared to LanceDB, so that of two
writers of the same photo one wins and none is there twice.
"""

import datetime
import json
import os
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from cib_jax.collection import lance, photo_rows
from cib_jax.collection.photo_rows import Row
from cib_jax.data import items

VERSION = 1
ENCODER, PHOTOS = "encoder", "photos"
KEPT = datetime.timedelta(days=1)
"""How long what was read before a change can still be read after it."""
AT_ONCE = 10_000
"""Keys that are named in one command."""
_CONFLICTS = 20
"""How often a change that met another writer's is tried again."""


class About(NamedTuple):
    """What an index is known by."""

    images: str
    """The folder of its photos, or the list of them, absolute."""
    encoder: dict[str, Any]
    """Of the encoder: its network, the length of its codes, a fingerprint of its weights."""
    learnt: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it
    """The fields of the config by which it was learnt from the photos, by dotted name; of a given one none."""

    @property
    def root(self) -> str:
        """The folder that paths are relative to."""
        is_list = self.images.lower().endswith(items.LISTS) and not os.path.isdir(self.images)
        return os.path.dirname(self.images) if is_list else self.images


class State(NamedTuple):
    """What is known of all files, in the order of their keys."""

    keys: Int64[np.ndarray, " files"]
    sizes: Int64[np.ndarray, " files"]
    modified_ns: Int64[np.ndarray, " files"]


class Snapshot(NamedTuple):
    """The photos that have codes, in the order of their keys, as they were at one moment."""

    keys: Int64[np.ndarray, " photos"]
    codes: UInt8[np.ndarray, "photos bytes"]
    rows: Int64[np.ndarray, " photos"]
    """Where each stands in the table."""
    table: Any
    """LanceDB's, as it was then."""


class PhotoTable:
    """An index on disk, in a bucket, or hosted. Any number of processes may read and write it at once."""

    def __init__(self, uri: str, about: About, connection: Any, photos: Any):
        self.uri, self.about = uri, about
        self._connection, self._photos = connection, photos

    @classmethod
    def exists(cls, uri: str) -> bool:
        """Returns whether there is an index.

        Raises:
          TableError: the place holds something else, or cannot be read.
        """
        if lance.local(uri):
            folder = pathlib.Path(uri)
            if folder.exists() and not folder.is_dir():
                raise lance.TableError(f"--index: {uri} is a file; give a folder")
            inside = lance.listed(folder)
            if inside and f"{ENCODER}.lance" not in inside:
                raise lance.TableError(
                    f"--index: {uri} holds files, but no index ({inside[0]}, …); give another folder"
                )
            if not inside:
                return False
        connection = lance.connected(uri)
        names = lance.tables(connection, uri)
        if ENCODER not in names or lance.opens(connection, uri, ENCODER):
            return ENCODER in names
        if PHOTOS in names:
            raise lance.TableError(
                f"--index: {uri} is damaged, its encoder is gone; bring {ENCODER}.lance back from a copy, or index the "
                "photos again in another folder"
            )
        return False

    @classmethod
    def open(cls, uri: str) -> "PhotoTable":
        """Returns the index at a place.

        Args:
          uri: a folder, or what else LanceDB takes, such as s3://bucket/folder or db://database.

        Raises:
          TableError: there is none, it cannot be read, or was made by another version.
        """
        if not cls.exists(uri):
            raise lance.TableError(
                f"--index: there is no index at {uri}; make one by --mode=index --images=PHOTOS --index={uri}"
            )
        connection = lance.connected(uri)
        with lance.told(uri, "read"):
            row = _rows(connection.open_table(ENCODER).search().select(["about"]))
            about = json.loads(row["about"][0].as_py())
        if about["version"] != VERSION:
            raise lance.TableError(
                f"--index: {uri} is of version {about['version']}, this package reads version {VERSION}; index the "
                "photos again in another folder, or use the package that made it"
            )
        return cls(
            uri,
            About(about["images"], about["encoder"], about.get("learnt", {})),
            connection,
            _photos(connection, uri, about),
        )

    @classmethod
    def create(cls, uri: str, about: About, encoder: bytes) -> "PhotoTable":
        """Returns a new index, or the one that another process made of the same place meanwhile.

        Args:
          uri: as in `open`.
          about: what it is known by.
          encoder: the file that `Hasher.save` writes.

        Raises:
          TableError: it cannot be written.
        """
        import pyarrow

        connection = lance.connected(uri)
        row = pyarrow.table({"about": [_told(about)], "hasher": pyarrow.array([encoder], pyarrow.large_binary())})
        try:
            connection.create_table(ENCODER, row)
        except Exception as error:  # LanceDB has no class of its own for any
            if not lance.opens(connection, uri, ENCODER):
                raise lance.refused(uri, "written", error) from error
        return cls.open(uri)

    def encoder(self) -> bytes:
        """Returns the file of the encoder.

        Raises:
          TableError: it cannot be read.
        """
        with lance.told(self.uri, "read"):
            return _rows(self._connection.open_table(ENCODER).search().select(["hasher"]))["hasher"][0].as_py()

    def move(self, images: str) -> None:
        """Notes that the photos, under the same names, lie in another folder now.

        Raises:
          TableError: it cannot be written.
        """
        about = self.about._replace(images=images)
        with lance.told(self.uri, "written"):
            self._connection.open_table(ENCODER).update(values={"about": _told(about)})
        self.about = about

    @property
    def version(self) -> int:
        """A number that grows with every change, by whomever."""
        with lance.told(self.uri, "read"):
            self._photos.checkout_latest()
            return self._photos.version

    def __len__(self) -> int:
        with lance.told(self.uri, "read"):
            return self._photos.count_rows()

    def state(self) -> State:
        """Returns what is known of all files now.

        Raises:
          TableError: it cannot be read.
        """
        with lance.told(self.uri, "read"):
            self._photos.checkout_latest()
            found = _rows(self._photos.search().select(["key", "size", "modified"]))
            keys, sizes = _numbers(found["key"]), _numbers(found["size"])
            modified = _numbers(found["modified"].cast("int64"))
        order = np.argsort(keys)
        return State(keys[order], sizes[order], modified[order])

    def unreadable(self) -> list[tuple[str, str]]:
        """Returns path and reason of files that have no code, by path.

        Raises:
          TableError: it cannot be read.
        """
        with lance.told(self.uri, "read"):
            found = _rows(self._photos.search().select(["path", "reason"]).where("reason IS NOT NULL"))
        return sorted(zip(found["path"].to_pylist(), found["reason"].to_pylist(), strict=True))

    def put(self, rows: Sequence[Row]) -> None:
        """Adds photos, each in the place of what was known of its path, in one commit.

        Raises:
          TableError: it cannot be written.
        """
        if not rows:
            return
        content = photo_rows.content(rows, self.about.encoder["bits"])

        def merge() -> None:
            merged = self._photos.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
            merged.execute(content)

        self._commit(merge)

    def remove(self, keys: Iterable[int]) -> None:
        """Forgets photos, in one commit.

        Raises:
          TableError: it cannot be written.
        """
        listed = ", ".join(str(int(key)) for key in keys)
        if listed:
            self._commit(lambda: self._photos.delete(f"key IN ({listed})"))

    def paths(self, keys: Iterable[int]) -> list[str]:
        """Returns the paths of some files.

        Raises:
          TableError: they cannot be read.
        """
        wanted, paths = [int(key) for key in keys], []
        for start in range(0, len(wanted), AT_ONCE):
            listed = ", ".join(map(str, wanted[start : start + AT_ONCE]))
            with lance.told(self.uri, "read"):
                found = _rows(self._photos.search().select(["path", "raw_path"]).where(f"key IN ({listed})"))
            paths += [photo_rows.path_of(row) for row in found.to_pylist()]
        return paths

    def tidy(self) -> None:
        """Joins what many commits left in small pieces, and forgets how things were more than a day ago.

        Raises:
          TableError: it cannot be written.
        """
        self._commit(lambda: self._photos.optimize(cleanup_older_than=KEPT))

    def snapshot(self) -> Snapshot:
        """Returns the photos that have codes now; what is read by it later is as of now, too.

        Raises:
          TableError: it cannot be read.
        """
        with lance.told(self.uri, "read"):
            table = self._connection.open_table(PHOTOS)
            table.checkout(table.version)
            found = _rows(table.search().select(["key", "code"]).where("code IS NOT NULL").with_row_id(True))
            keys, rows = _numbers(found["key"]), _numbers(found["_rowid"])
            bits = self.about.encoder["bits"]
            codes = np.asarray(found["code"].combine_chunks().flatten(), np.uint8).reshape(-1, bits // 8)
        order = np.argsort(keys)
        return Snapshot(keys[order], codes[order], rows[order], table)

    def read(self, snapshot: Snapshot, numbers: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Returns columns of some photos, by their position in the snapshot; times in nanoseconds since 1970.

        Raises:
          TableError: they cannot be read, as where the files of an old snapshot were tidied away.
        """
        if not len(numbers):
            return {}
        wanted = sorted(set(numbers))
        with lance.told(self.uri, "read"):
            taken = snapshot.table.take_row_ids(snapshot.rows[wanted].tolist()).select(["key", *columns]).to_arrow()
        # In the table's order, not in ours.
        places = np.searchsorted(snapshot.keys, _numbers(taken["key"])).tolist()
        if "modified" in columns:
            at = taken.schema.get_field_index("modified")
            taken = taken.set_column(at, "modified", taken["modified"].cast("int64"))
        return dict(zip(places, taken.to_pylist(), strict=True))

    def _commit(self, change: Any) -> None:
        for attempt in range(_CONFLICTS):
            try:
                self._photos.checkout_latest()
                change()
                return
            except Exception as error:  # LanceDB has no class of its own for any
                if "conflict" not in str(error).lower() or attempt == _CONFLICTS - 1:
                    raise lance.refused(self.uri, "written", error) from error
                time.sleep(0.05 * (attempt + 1))  # another writer was faster


def _told(about: About) -> str:
    return json.dumps({"version": VERSION} | about._asdict())


def _rows(query: Any) -> Any:
    return query.limit(None).to_arrow()


def _numbers(column: Any) -> Int64[np.ndarray, " rows"]:
    return column.combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)


def _photos(connection: Any, uri: str, about: dict[str, Any]) -> Any:
    with lance.told(uri, "read"):
        # The first process may have been killed between the two tables.
        return connection.create_table(PHOTOS, schema=photo_rows.schema(about["encoder"]["bits"]), exist_ok=True)
