"""Reaching LanceDB, and what goes wrong with it told in a sentence."""

import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from cib_jax import errors
from cib_jax.data import inputs
from cib_jax.errors import IndexFolderError, UserError
from cib_jax.files import printable

# collection.lance: Reaching LanceDB, and what goes wrong with it told in a sentence.


_MISSING = "--index: LanceDB is not installed; pip install 'cib-jax[search]'"


def check_installed() -> None:
    """Checks, without importing it, that LanceDB is there: before photos are learnt from, which takes minutes.

    Raises:
      TableError: it is not installed.
    """
    if importlib.util.find_spec("lancedb") is None:
        raise IndexFolderError(_MISSING)


def connected(uri: str) -> Any:
    """Returns LanceDB's connection to a place: a folder, which it makes, or what else it takes.

    Raises:
      TableError: it is not installed, or cannot reach the place.
    """
    try:
        import lancedb
    except ImportError as error:
        raise IndexFolderError(_MISSING) from error
    with told(uri, "reached"):
        return lancedb.connect(uri)


def tables(connection: Any, uri: str) -> list[str]:
    """Returns the names of all tables.

    Raises:
      TableError: they cannot be read.
    """
    found: list[str] = []
    with told(uri, "read"):
        while True:
            answer = connection.list_tables(page_token=found[-1] if found else None, limit=100)
            found += answer.tables
            if len(answer.tables) < 100:
                return found


def opens(connection: Any, uri: str, name: str) -> bool:
    """Returns whether a table that `tables` names is whole: of one whose first writer was killed, pieces are listed.

    Raises:
      TableError: it cannot be read.
    """
    with told(uri, "read"):
        try:
            connection.open_table(name)
        except Exception as error:  # LanceDB has no class of its own for any
            if "was not found" in str(error):
                return False
            raise
    return True


def place_of(uri: pathlib.Path | str) -> str:
    """Returns the place that a user named, a folder as an absolute path."""
    text = os.fspath(uri)
    if not text:
        raise IndexFolderError(
            "--index: it is empty; give a folder, or what else LanceDB takes, such as s3://bucket/folder"
        )
    return os.path.abspath(os.path.expanduser(text)) if local(text) else text


def local(uri: str) -> bool:
    """Returns whether a place is a folder of this machine."""
    return "://" not in uri


def listed(folder: pathlib.Path) -> list[str]:
    """Returns the names of what is in a folder and not hidden; of none, if it is not there.

    Raises:
      TableError: it cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise IndexFolderError(
            f"--index: {folder} cannot be read ({error.strerror}); give a folder that you may read"
        ) from None


@contextlib.contextmanager
def told(uri: str, done: str) -> Iterator[None]:
    """Turns whatever LanceDB raises into a TableError, which says what could not be `done` to the index."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # LanceDB has no class of its own for any
        raise refused(uri, done, error) from error


def refused(uri: str, done: str, error: Exception) -> IndexFolderError:
    """Returns an error of LanceDB in a sentence."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "No space left on device" in str(error):
        first = "the disk is full"
    reason = first.rstrip(".")
    return IndexFolderError(
        f"--index: {uri} cannot be {done} ({reason}); mend that, and the same command goes on with what is there"
    )


# collection.photo_rows: What an index keeps of one photo, and how that stands in an Arrow table.


# By it LanceDB sees that two writers add the same photo.
_KEY = {"lance-schema:unenforced-primary-key": "true"}


class Row(NamedTuple):
    """A photo, or a file that is none."""

    path: str
    """Relative to the root, or absolute."""
    size: int
    """In bytes; −1: it may become readable without being changed."""
    modified_ns: int
    """Time of the last change in nanoseconds since 1970; −1: the same."""
    code: bytes | None = None
    """Packed; None: it cannot be read."""
    width: int = 0
    height: int = 0
    thumbnail: bytes = b""
    reason: str = ""
    """Why it cannot be read."""


def key_of(path: str) -> int:
    """Returns the key of a path: eight bytes of its digest, as a signed number."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big", signed=True)


def path_of(row: dict[str, Any]) -> str:
    """Returns the path of a row with the columns path and raw_path."""
    return row["path"] if row["raw_path"] is None else os.fsdecode(row["raw_path"])


def row_content(rows: Sequence[Row], bits: int) -> Any:
    """Returns photos as an Arrow table."""
    import pyarrow

    codes = [None if row.code is None else list(row.code) for row in rows]
    valid = [_is_unicode(row.path) for row in rows]
    paths = [row.path for row in rows]
    return pyarrow.table(
        {
            "key": [key_of(path) for path in paths],
            "path": [printable(path) for path in paths],
            "raw_path": [None if good else os.fsencode(path) for good, path in zip(valid, paths, strict=True)],
            "code": codes,
            "size": [row.size for row in rows],
            "modified": pyarrow.array([row.modified_ns for row in rows], pyarrow.int64()).cast(_time()),
            "width": [row.width for row in rows],
            "height": [row.height for row in rows],
            "thumbnail": [row.thumbnail for row in rows],
            "reason": [row.reason or None for row in rows],
        },
        schema=schema(bits),
    )


def schema(bits: int) -> Any:
    """Returns the Arrow schema of photos with codes of this length."""
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


def _is_unicode(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


# collection.photo_table: Which photos are indexed and what is kept of each: a LanceDB table, and beside it the encoder that made the codes.
#
# The first table, `encoder`, has one row: what the index is known by, and the encoder as `Hasher.save` writes it. The
# second, `photos`, has a row for each photo, under a digest of its path. That key is declared to LanceDB, so that of two
# writers of the same photo one wins and none is there twice.


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
        is_list = self.images.lower().endswith(inputs.LISTS) and not os.path.isdir(self.images)
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
        if local(uri):
            folder = pathlib.Path(uri)
            if folder.exists() and not folder.is_dir():
                raise errors.IndexFolderError(f"--index: {uri} is a file; give a folder")
            inside = listed(folder)
            if inside and f"{ENCODER}.lance" not in inside:
                raise errors.IndexFolderError(
                    f"--index: {uri} holds files, but no index ({inside[0]}, …); give another folder"
                )
            if not inside:
                return False
        connection = connected(uri)
        names = tables(connection, uri)
        if ENCODER not in names or opens(connection, uri, ENCODER):
            return ENCODER in names
        if PHOTOS in names:
            raise errors.IndexFolderError(
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
            raise errors.IndexFolderError(
                f"--index: there is no index at {uri}; make one by --mode=index --images=PHOTOS --index={uri}"
            )
        connection = connected(uri)
        with told(uri, "read"):
            row = _rows(connection.open_table(ENCODER).search().select(["about"]))
            about = json.loads(row["about"][0].as_py())
        if about["version"] != VERSION:
            raise errors.IndexFolderError(
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

        connection = connected(uri)
        row = pyarrow.table({"about": [_told(about)], "hasher": pyarrow.array([encoder], pyarrow.large_binary())})
        try:
            connection.create_table(ENCODER, row)
        except Exception as error:  # LanceDB has no class of its own for any
            if not opens(connection, uri, ENCODER):
                raise refused(uri, "written", error) from error
        return cls.open(uri)

    def encoder(self) -> bytes:
        """Returns the file of the encoder.

        Raises:
          TableError: it cannot be read.
        """
        with told(self.uri, "read"):
            return _rows(self._connection.open_table(ENCODER).search().select(["hasher"]))["hasher"][0].as_py()

    def move(self, images: str) -> None:
        """Notes that the photos, under the same names, lie in another folder now.

        Raises:
          TableError: it cannot be written.
        """
        about = self.about._replace(images=images)
        with told(self.uri, "written"):
            self._connection.open_table(ENCODER).update(values={"about": _told(about)})
        self.about = about

    @property
    def version(self) -> int:
        """A number that grows with every change, by whomever."""
        with told(self.uri, "read"):
            self._photos.checkout_latest()
            return self._photos.version

    def __len__(self) -> int:
        with told(self.uri, "read"):
            return self._photos.count_rows()

    def state(self) -> State:
        """Returns what is known of all files now.

        Raises:
          TableError: it cannot be read.
        """
        with told(self.uri, "read"):
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
        with told(self.uri, "read"):
            found = _rows(self._photos.search().select(["path", "reason"]).where("reason IS NOT NULL"))
        return sorted(zip(found["path"].to_pylist(), found["reason"].to_pylist(), strict=True))

    def put(self, rows: Sequence[Row]) -> None:
        """Adds photos, each in the place of what was known of its path, in one commit.

        Raises:
          TableError: it cannot be written.
        """
        if not rows:
            return
        content = row_content(rows, self.about.encoder["bits"])

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
            with told(self.uri, "read"):
                found = _rows(self._photos.search().select(["path", "raw_path"]).where(f"key IN ({listed})"))
            paths += [path_of(row) for row in found.to_pylist()]
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
        with told(self.uri, "read"):
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
        with told(self.uri, "read"):
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
                    raise refused(self.uri, "written", error) from error
                time.sleep(0.05 * (attempt + 1))  # another writer was faster


def _told(about: About) -> str:
    return json.dumps({"version": VERSION} | about._asdict())


def _rows(query: Any) -> Any:
    return query.limit(None).to_arrow()


def _numbers(column: Any) -> Int64[np.ndarray, " rows"]:
    return column.combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)


def _photos(connection: Any, uri: str, about: dict[str, Any]) -> Any:
    with told(uri, "read"):
        # The first process may have been killed between the two tables.
        return connection.create_table(PHOTOS, schema=schema(about["encoder"]["bits"]), exist_ok=True)
