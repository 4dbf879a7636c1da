"""Which photos are indexed and what is kept of each: a LanceDB table, and beside it the encoder that made the codes.

The first table, `encoder`, has one row: what the index is known by, and the encoder as `Hasher.save` writes it. The
second, `photos`, has a row for each photo, under a digest of its path. That key is declared to LanceDB, so that of two
writers of the same photo one wins and none is there twice.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from cib_jax.errors import Refusal

VERSION = 1
ENCODER, PHOTOS = "encoder", "photos"
_KEY = {"lance-schema:unenforced-primary-key": "true"}
_CONFLICTS = 20
"""How often a change that met another writer's is tried again."""


class TableError(Refusal):
    """An index cannot be read, written or used; the message names it and what to do."""


class About(NamedTuple):
    """What an index is known by."""

    root: str
    """The folder that its photos lie in, absolute."""
    encoder: dict[str, Any]
    """Of the encoder: its network, the length of its codes, a fingerprint of its weights."""


class Row(NamedTuple):
    """A photo, or a file that is none."""

    path: str
    """Relative to the root, or absolute."""
    size: int
    """In bytes."""
    modified_ns: int
    """Time of the last change in nanoseconds since 1970."""
    code: bytes | None = None
    """Packed; None: it cannot be read."""
    width: int = 0
    height: int = 0
    thumbnail: bytes = b""
    reason: str = ""
    """Why it cannot be read."""


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


def key_of(path: str) -> int:
    """Returns the key of a path: eight bytes of its digest, as a signed number."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big", signed=True)


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
        if _local(uri):
            folder = pathlib.Path(uri)
            if folder.exists() and not folder.is_dir():
                raise TableError(f"--index: {uri} is a file; give a folder")
            inside = _listed(folder)
            if inside and f"{ENCODER}.lance" not in inside:
                raise TableError(f"--index: {uri} holds files, but no index ({inside[0]}, …); give another folder")
            if not inside:
                return False
        return ENCODER in _tables(_connected(uri), uri)

    @classmethod
    def open(cls, uri: str) -> "PhotoTable":
        """Returns the index at a place.

        Args:
          uri: a folder, or what else LanceDB takes, such as s3://bucket/folder or db://database.

        Raises:
          TableError: there is none, it cannot be read, or was made by another version.
        """
        if not cls.exists(uri):
            raise TableError(
                f"--index: there is no index at {uri}; make one by --mode=index --images=PHOTOS --index={uri}"
            )
        connection = _connected(uri)
        with _told(uri, "read"):
            row = _rows(connection.open_table(ENCODER).search().select(["about"]))
            about = json.loads(row["about"][0].as_py())
        if about["version"] != VERSION:
            raise TableError(
                f"--index: {uri} is of version {about['version']}, this package reads version {VERSION}; index the "
                "photos again in another folder, or use the package that made it"
            )
        return cls(uri, About(about["root"], about["encoder"]), connection, _photos(connection, uri, about))

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

        connection = _connected(uri)
        told = {"version": VERSION, "root": about.root, "encoder": about.encoder}
        row = pyarrow.table({"about": [json.dumps(told)], "hasher": pyarrow.array([encoder], pyarrow.large_binary())})
        if ENCODER not in _tables(connection, uri):
            try:
                connection.create_table(ENCODER, row)
            except Exception as error:  # LanceDB has no class of its own for any
                if ENCODER not in _tables(connection, uri):
                    raise _refused(uri, "written", error) from error
        return cls.open(uri)

    def encoder(self) -> bytes:
        """Returns the file of the encoder.

        Raises:
          TableError: it cannot be read.
        """
        with _told(self.uri, "read"):
            return _rows(self._connection.open_table(ENCODER).search().select(["hasher"]))["hasher"][0].as_py()

    def move(self, root: str) -> None:
        """Notes that all photos lie in another folder now.

        Raises:
          TableError: it cannot be written.
        """
        told = {"version": VERSION, "root": root, "encoder": self.about.encoder}
        with _told(self.uri, "written"):
            self._connection.open_table(ENCODER).update(values={"about": json.dumps(told)})
        self.about = self.about._replace(root=root)

    @property
    def version(self) -> int:
        """A number that grows with every change, by whomever."""
        with _told(self.uri, "read"):
            self._photos.checkout_latest()
            return self._photos.version

    def __len__(self) -> int:
        with _told(self.uri, "read"):
            return self._photos.count_rows()

    def state(self) -> State:
        """Returns what is known of all files now.

        Raises:
          TableError: it cannot be read.
        """
        with _told(self.uri, "read"):
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
        with _told(self.uri, "read"):
            found = _rows(self._photos.search().select(["path", "reason"]).where("reason IS NOT NULL"))
        return sorted(zip(found["path"].to_pylist(), found["reason"].to_pylist(), strict=True))

    def put(self, rows: Sequence[Row]) -> None:
        """Adds photos, each in the place of what was known of its path, in one commit.

        Raises:
          TableError: it cannot be written.
        """
        content = _content(rows, self.about.encoder["bits"])

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

    def tidy(self) -> None:
        """Joins what many commits left in small pieces.

        Raises:
          TableError: it cannot be written.
        """
        self._commit(self._photos.optimize)

    def snapshot(self) -> Snapshot:
        """Returns the photos that have codes now; what is read by it later is as of now, too.

        Raises:
          TableError: it cannot be read.
        """
        with _told(self.uri, "read"):
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
        with _told(self.uri, "read"):
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
                    raise _refused(self.uri, "written", error) from error
                time.sleep(0.05 * (attempt + 1))  # another writer was faster


def path_of(row: dict[str, Any]) -> str:
    """Returns the path of a row with the columns path and raw_path."""
    return row["path"] if row["raw_path"] is None else os.fsdecode(row["raw_path"])


def _content(rows: Sequence[Row], bits: int) -> Any:
    import pyarrow

    codes = [None if row.code is None else list(row.code) for row in rows]
    valid = [_is_unicode(row.path) for row in rows]
    paths = [row.path for row in rows]
    return pyarrow.table(
        {
            "key": [key_of(path) for path in paths],
            "path": [path.encode("utf-8", "backslashreplace").decode() for path in paths],
            "raw_path": [None if good else os.fsencode(path) for good, path in zip(valid, paths, strict=True)],
            "code": codes,
            "size": [row.size for row in rows],
            "modified": pyarrow.array([row.modified_ns for row in rows], pyarrow.int64()).cast(_time()),
            "width": [row.width for row in rows],
            "height": [row.height for row in rows],
            "thumbnail": [row.thumbnail for row in rows],
            "reason": [row.reason or None for row in rows],
        },
        schema=_schema(bits),
    )


def _schema(bits: int) -> Any:
    import pyarrow

    return pyarrow.schema(
        [
            pyarrow.field("key", pyarrow.int64(), nullable=False, metadata=_KEY),
            pyarrow.field("path", pyarrow.string()),
            # Where it is no valid Unicode, as the names of files may be.
            pyarrow.field("raw_path", pyarrow.binary()),
            # As LanceDB's own search by Hamming distance wants it.
            pyarrow.field("code", pyarrow.list_(pyarrow.uint8(), bits // 8)),
            pyarrow.field("size", pyarrow.int64()),
            pyarrow.field("modified", _time()),
            pyarrow.field("width", pyarrow.int32()),
            pyarrow.field("height", pyarrow.int32()),
            pyarrow.field("thumbnail", pyarrow.binary()),
            pyarrow.field("reason", pyarrow.string()),
        ]
    )


def _time() -> Any:
    import pyarrow

    return pyarrow.timestamp("ns", "UTC")


def _rows(query: Any) -> Any:
    return query.limit(None).to_arrow()


def _numbers(column: Any) -> Int64[np.ndarray, " rows"]:
    return column.combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)


def _photos(connection: Any, uri: str, about: dict[str, Any]) -> Any:
    with _told(uri, "read"):
        # The first process may have been killed between the two tables.
        return connection.create_table(PHOTOS, schema=_schema(about["encoder"]["bits"]), exist_ok=True)


def _connected(uri: str) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise TableError("--index: LanceDB is not installed; pip install 'cib-jax[search]'") from error
    with _told(uri, "reached"):
        return lancedb.connect(uri)


def _tables(connection: Any, uri: str) -> list[str]:
    found: list[str] = []
    with _told(uri, "read"):
        while True:
            answer = connection.list_tables(page_token=found[-1] if found else None, limit=100)
            found += answer.tables
            if len(answer.tables) < 100:
                return found


def _local(uri: str) -> bool:
    return "://" not in uri


def _listed(folder: pathlib.Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TableError(
            f"--index: {folder} cannot be read ({error.strerror}); give a folder that you may read"
        ) from None


@contextlib.contextmanager
def _told(uri: str, done: str) -> Iterator[None]:
    try:
        yield
    except Refusal:
        raise
    except Exception as error:  # LanceDB has no class of its own for any
        raise _refused(uri, done, error) from error


def _refused(uri: str, done: str, error: Exception) -> TableError:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "No space left on device" in str(error):
        first = "the disk is full"
    return TableError(
        f"--index: {uri} cannot be {done} ({first.rstrip('.')}); mend that, and the same command goes on with what is there"
    )


def _is_unicode(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
