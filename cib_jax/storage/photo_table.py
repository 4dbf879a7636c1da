"""LanceDB table of indexed photos: path, code, size, time, dimensions and thumbnail of each.

An index has two tables. `encoder` has one row: the metadata of the index, and the encoder as `Hasher.save` writes it.
`photos` has one row for each photo, under a digest of its path. That key is declared to LanceDB, so that of two writers
of the same photo one wins and no photo is in the table twice.
"""

import contextlib
import datetime
import hashlib
import json
import os
import pathlib
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from cib_jax.codes import byte_count
from cib_jax.data import inputs
from cib_jax.data.dataset import Unreadable
from cib_jax.errors import IndexFolderError, UserError
from cib_jax.files import count, first_line, import_optional, install_command, is_installed
from cib_jax.storage.rows import file_columns, path_of, timestamp

VERSION = 1
ENCODER, PHOTOS = "encoder", "photos"
KEPT = datetime.timedelta(days=1)
"""Time for which a snapshot can still be read after a change."""
AT_ONCE = 10_000
"""Largest number of keys in one command to LanceDB."""
_HALF = (1 << 32) - 1
_NUMBERS = ("size", "modified", "width", "height")
_MAX_ATTEMPTS = 20
"""Attempts to commit a change that conflicts with those of other writers."""
_MISSING = f"LanceDB is not installed; {install_command('search')}"


class Row(NamedTuple):
    """A photo, or with a reason and no code, a file that cannot be read as one."""

    path: str
    """Path relative to the root, or absolute."""
    size: int
    """Size in bytes. It and the time since 1970 are −1 if the file may become readable without being changed."""
    modified_ns: int
    code: bytes | None = None
    width: int = 0
    height: int = 0
    thumbnail: bytes = b""
    reason: str = ""
    feature: bytes | None = None
    """Features of the backbone, quantized to a byte each."""


class IndexMetadata(NamedTuple):
    """Metadata of an index."""

    images: str
    """Absolute path of the folder of photos, or of the list of them."""
    encoder: dict[str, Any]
    """Identity of the encoder: its network, the length of its codes, a fingerprint of its weights."""
    learnt: dict[str, Any] = {}  # noqa: RUF012 - never changed
    """Config fields, by dotted name, with which the encoder was learned from the photos; empty if it was given."""
    photos: int = 0
    """Number of photo files when the encoder was learned; 0 if it was given, or by an earlier version."""
    exclude: tuple[str, ...] = ()
    """Patterns of files and folders that are left out, as in `photo_folder.is_excluded`."""

    @property
    def root(self) -> str:
        """The folder to which paths are relative."""
        is_list = self.images.lower().endswith(inputs.LISTS) and not os.path.isdir(self.images)
        return os.path.dirname(self.images) if is_list else self.images


class State(NamedTuple):
    """Size and time of all files, in the order of their keys."""

    keys: Int64[np.ndarray, " files"]
    sizes: Int64[np.ndarray, " files"]
    modified_ns: Int64[np.ndarray, " files"]


class Snapshot(NamedTuple):
    """The photos with codes at one moment, in the order of their keys."""

    keys: Int64[np.ndarray, " photos"]
    codes: UInt8[np.ndarray, "photos bytes"]
    rows: Int64[np.ndarray, " photos"]
    """Row ids in the table."""
    table: Any
    """LanceDB's table at that version."""

    def take(self, numbers: Int64[np.ndarray, " taken"]) -> "Snapshot":
        """Returns some of the photos, by increasing position."""
        return self._replace(keys=self.keys[numbers], codes=self.codes[numbers], rows=self.rows[numbers])


class PhotoTable:
    """An index on disk, in a bucket, or hosted. Any number of processes may read and write it at once.

    Every method raises an IndexFolderError if the index cannot be read or written, such as from a snapshot of which the
    files were deleted since.
    """

    def __init__(self, uri: str, metadata: IndexMetadata, connection: Any, photos: Any, created: datetime.datetime):
        self.uri, self.metadata = uri, metadata
        self._connection, self._photos = connection, photos
        self.created = created
        """Time at which the index was made, which another index at the same place does not share."""

    @classmethod
    def exists(cls, uri: str) -> bool:
        """Returns whether there is an index; a place that holds something else is an error."""
        if is_local(uri):
            try:
                inside = sorted(path.name for path in pathlib.Path(uri).iterdir() if not path.name.startswith("."))
            except FileNotFoundError:
                return False
            except NotADirectoryError:
                raise _error(f"{uri} is a file; give a folder") from None
            except OSError as error:
                raise _error(f"{uri} cannot be read ({error.strerror}); give a folder that you may read") from None
            if not inside:
                return False
            if f"{ENCODER}.lance" not in inside:
                raise _error(f"{uri} holds files, but no index ({inside[0]}, …); give another folder")
        connection = _connect(uri)
        names = _table_names(connection, uri)
        if ENCODER not in names or _can_open(connection, uri, ENCODER):
            return ENCODER in names
        if PHOTOS in names:
            raise _error(
                f"{uri} is damaged, its encoder is gone; restore {ENCODER}.lance from a copy, or index the photos "
                "again in another folder"
            )
        return False

    @classmethod
    def open(cls, uri: str) -> "PhotoTable":
        """Returns the index in a folder, or another place of LanceDB, as s3://bucket/folder or db://database."""
        if not cls.exists(uri):
            raise _error(f"there is no index at {uri}; make one by --mode=index --images=PHOTOS --index={uri}")
        connection = _connect(uri)
        with lance_errors(uri, "read"):
            table = connection.open_table(ENCODER)
            row, created = _fetch(table.search().select(["about"])), table.list_versions()[0]["timestamp"]
            metadata = json.loads(row["about"][0].as_py())
            version = metadata["version"]
            made = parse(metadata) if version == VERSION else None
        if made is None:
            raise _error(
                f"{uri} is of version {version}, this package reads version {VERSION}; index the photos "
                "again in another folder, or use the package that made it"
            )
        with lance_errors(uri, "read"):
            # The process that made the index may have been killed between the two tables.
            try:
                photos = connection.create_table(PHOTOS, schema=_schema(made.encoder["bits"]), exist_ok=True)
            except Exception:  # of another schema: made by a version without features
                photos = connection.open_table(PHOTOS)
        return cls(uri, made, connection, photos, created)

    @classmethod
    def create(cls, uri: str, metadata: IndexMetadata, encoder: bytes) -> "PhotoTable":
        """Returns a new index, or the one that another process made at the same place meanwhile.

        `encoder` is the content of the file that `Hasher.save` writes.
        """
        import pyarrow

        connection = _connect(uri)
        row = {"about": [serialize(metadata)], "hasher": pyarrow.array([encoder], pyarrow.large_binary())}
        try:
            connection.create_table(ENCODER, pyarrow.table(row))
        except Exception as error:  # LanceDB's errors have no class of their own
            if not _can_open(connection, uri, ENCODER):
                raise _lance_error(uri, "written", error) from error
        return cls.open(uri)

    def encoder(self) -> bytes:
        """Returns the file of the encoder."""
        with lance_errors(self.uri, "read"):
            return _fetch(self._connection.open_table(ENCODER).search().select(["hasher"]))["hasher"][0].as_py()

    def record(self, *, images: str, exclude: Sequence[str]) -> None:
        """Records the folder in which the photos are now, under the same names, and the patterns of others in it."""
        metadata = self.metadata._replace(images=images, exclude=tuple(exclude))
        if metadata == self.metadata:
            return
        with lance_errors(self.uri, "written"):
            self._connection.open_table(ENCODER).update(values={"about": serialize(metadata)})
        self.metadata = metadata

    @property
    def has_features(self) -> bool:
        """Whether photos have features; those indexed by earlier versions have none."""
        return "feature" in self._photos.schema.names

    @property
    def version(self) -> int:
        """A number that grows with every change by any process."""
        with lance_errors(self.uri, "read"):
            self._photos.checkout_latest()
            return self._photos.version

    def __len__(self) -> int:
        with lance_errors(self.uri, "read"):
            return self._photos.count_rows()

    def state(self) -> State:
        """Returns the current size and time of all files; the time of those with a damaged code or number is −1."""
        with lance_errors(self.uri, "read"):
            self._photos.checkout_latest()
            names = _present(["key", *_NUMBERS, "code", "check", "check_rest"], self._photos)
            found = _fetch(self._photos.search().select(names))
            keys, sizes = as_numpy(found["key"]), as_numpy(found["size"])
            modified = as_numpy(found["modified"].cast("int64"))
            modified[np.isin(keys, damaged_keys(found))] = -1  # so that they are encoded again
        order = np.argsort(keys)
        return State(keys[order], sizes[order], modified[order])

    def unreadable(self) -> list[Unreadable]:
        """Returns the files without a code, by path, with the reasons."""
        with lance_errors(self.uri, "read"):
            names = _present(["key", "path", "raw_path", "reason", "check_rest"], self._photos)
            found = _fetch(self._photos.search().select(names).where("reason IS NOT NULL"))
            validate_rows(found, self.uri)
        return sorted(Unreadable(path_of(row), row["reason"]) for row in found.to_pylist())

    def put(self, rows: Sequence[Row]) -> None:
        """Adds photos, or replaces those with the same paths, in one commit."""
        if not rows:
            return
        content = _as_table(rows, self.metadata.encoder["bits"])
        content = content.select([name for name in content.column_names if name in self._photos.schema.names])

        def merge() -> None:
            matched = self._photos.merge_insert("key").when_matched_update_all()
            matched.when_not_matched_insert_all().execute(content)

        self._commit(merge)

    def remove(self, keys: Iterable[int]) -> None:
        """Removes photos, in one commit."""
        if listed := ", ".join(str(int(key)) for key in keys):
            self._commit(lambda: self._photos.delete(f"key IN ({listed})"))

    def paths(self, keys: Iterable[int]) -> list[str]:
        """Returns the paths of some files."""
        wanted, paths = [str(int(key)) for key in keys], []
        for start in range(0, len(wanted), AT_ONCE):
            listed = ", ".join(wanted[start : start + AT_ONCE])
            with lance_errors(self.uri, "read"):
                found = _fetch(self._photos.search().select(["key", "path", "raw_path"]).where(f"key IN ({listed})"))
                validate_rows(found, self.uri)
            paths += [path_of(row) for row in found.to_pylist()]
        return paths

    def compact(self) -> None:
        """Joins the small pieces that many commits left, and deletes versions older than a day."""
        self._commit(lambda: self._photos.optimize(cleanup_older_than=KEPT))

    def snapshot(self) -> Snapshot:
        """Returns the photos that have codes now; `read` with it returns their rows as of now."""
        with lance_errors(self.uri, "read"):
            table = self._connection.open_table(PHOTOS)
            table.checkout(table.version)
            query = table.search().select(_present(["key", "code", "check"], table))
            found = _fetch(query.where("code IS NOT NULL").with_row_id(True))
            if damaged := damaged_keys(found):
                problem = f"the codes of {count(len(damaged), 'photo')} in {self.uri} are damaged on the disk"
                raise _error(f"{problem}; index the photos again, and these are encoded again")
            keys, rows = as_numpy(found["key"]), as_numpy(found["_rowid"])
            codes = codes_of(found)
        order = np.argsort(keys)
        return Snapshot(keys[order], codes[order], rows[order], table)

    def rows(self, columns: Sequence[str]) -> Any:
        """Returns columns of the photos that have codes now, checked, as an Arrow table."""
        with lance_errors(self.uri, "read"):
            table = self._connection.open_table(PHOTOS)
            names = _present(dict.fromkeys([*columns, "check", "check_rest"]), table)
            found = _fetch(table.search().select(names).where("code IS NOT NULL"))
            validate_rows(found, self.uri)
        return found.select(_present(columns, table))

    def paths_and_times(self, snapshot: Snapshot) -> tuple[list[str], Int64[np.ndarray, " photos"]]:
        """Returns the paths of all photos of a snapshot, in its order, and their times in nanoseconds since 1970."""
        with lance_errors(self.uri, "read"):
            names = _present(["key", "path", "raw_path", *_NUMBERS, "check_rest"], snapshot.table)
            found = _fetch(snapshot.table.search().select(names).where("code IS NOT NULL"))
            validate_rows(found, self.uri)
        found = found.take(np.argsort(as_numpy(found["key"])))
        found = found.filter(np.isin(as_numpy(found["key"]), snapshot.keys))
        rows = found.select(["path", "raw_path"]).to_pylist()
        return [path_of(row) for row in rows], as_numpy(found["modified"].cast("int64"))

    def read(self, snapshot: Snapshot, numbers: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Returns columns of some photos, by their position in the snapshot; times in nanoseconds since 1970."""
        if not len(numbers):
            return {}
        wanted = sorted(set(numbers))
        with lance_errors(self.uri, "read"):
            query = snapshot.table.take_row_ids(snapshot.rows[wanted].tolist())
            names = dict.fromkeys(["key", "path", "raw_path", *columns, *_NUMBERS, "check", "check_rest"])
            taken = query.select(_present(names, snapshot.table)).to_arrow()
            validate_rows(taken, self.uri)
        # LanceDB returns rows in the table's order.
        positions = np.searchsorted(snapshot.keys, as_numpy(taken["key"])).tolist()
        # As numbers, since Arrow makes Python objects of nanoseconds only where Pandas is installed.
        at = taken.schema.get_field_index("modified")
        taken = taken.set_column(at, "modified", taken["modified"].cast("int64")).select(
            _present(columns, snapshot.table)
        )
        return dict(zip(positions, taken.to_pylist(), strict=True))

    def _commit(self, change: Callable[[], Any]) -> None:
        for attempt in range(_MAX_ATTEMPTS):
            try:
                self._photos.checkout_latest()
                change()
                return
            except Exception as error:  # LanceDB's errors have no class of their own
                if "conflict" not in str(error).lower() or attempt == _MAX_ATTEMPTS - 1:
                    raise _lance_error(self.uri, "written", error) from error
                time.sleep(0.05 * (attempt + 1))  # another writer was faster


def parse(metadata: Any) -> IndexMetadata:
    """Returns the metadata that `serialize` wrote; raises an error of any type for others."""
    if metadata.get("checksum", _checksum(metadata)) != _checksum(metadata):
        raise ValueError("its metadata are damaged")
    optional = (metadata.get("learnt", {}), metadata.get("photos", 0), tuple(metadata.get("exclude", ())))
    made = IndexMetadata(metadata["images"], metadata["encoder"], *optional)
    numbers = made.encoder["bits"], made.encoder["side"], made.photos, made.learnt.get("data.train_images", 0)
    right = all(type(number) is int for number in numbers) and 0 < numbers[0] < 1 << 20 and 0 < numbers[1] < 1 << 15
    if not right or not all(isinstance(text, str) for text in (made.images, *made.exclude)):
        raise ValueError("its metadata are damaged")
    return made


def serialize(metadata: IndexMetadata) -> str:
    """Returns the metadata as JSON."""
    about = {"version": VERSION} | metadata._asdict()
    return json.dumps(about | {"checksum": _checksum(about)})


def _checksum(about: dict[str, Any]) -> int:
    rest = {name: value for name, value in about.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


# Rows in Arrow.


def key_of(path: str) -> int:
    """Returns the key of a path: eight bytes of its digest, as a signed number."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big", signed=True)


def _as_table(rows: Sequence[Row], bits: int) -> Any:
    """Returns photos as an Arrow table."""
    import pyarrow

    paths, sizes, times, codes, *looks, reasons, features = zip(*rows, strict=True)
    columns = file_columns(paths, sizes, times, reasons)
    columns["width"], columns["height"], columns["thumbnail"] = looks
    columns["key"] = [key_of(path) for path in paths]
    columns["check"] = [
        zlib.crc32(thumbnail) << 32 | zlib.crc32(code or b"", key & _HALF)
        for key, code, thumbnail in zip(columns["key"], codes, looks[2], strict=True)
    ]
    columns["feature"] = features
    columns["check_rest"] = [
        zlib.crc32(reason.encode() if feature is None else feature) << 32
        | zlib.crc32(struct.pack("<4q", size, modified, width, height), key & _HALF)
        for key, size, modified, width, height, reason, feature in zip(
            columns["key"], sizes, times, *looks[:2], reasons, features, strict=True
        )
    ]
    columns["code"] = [None if code is None else list(code) for code in codes]
    return pyarrow.table(columns, schema=_schema(bits))


def _schema(bits: int) -> Any:
    """Returns the Arrow schema of photos with codes of this length."""
    import pyarrow

    # By this key LanceDB notices that two writers add the same photo.
    primary = {"lance-schema:unenforced-primary-key": "true"}
    key = pyarrow.field("key", pyarrow.int64(), nullable=False, metadata=primary)
    types = {
        "path": pyarrow.string(),
        "raw_path": pyarrow.binary(),
        # The type that LanceDB's own search by Hamming distance takes.
        "code": pyarrow.list_(pyarrow.uint8(), byte_count(bits)),
        "size": pyarrow.int64(),
        "modified": timestamp(),
        "width": pyarrow.int32(),
        "height": pyarrow.int32(),
        "thumbnail": pyarrow.binary(),
        "reason": pyarrow.string(),
        "feature": pyarrow.binary(),
        # Lance's files have no checksums. Above, the CRC-32 of the thumbnail; below, that of the key and the code.
        "check": pyarrow.uint64(),
        # Above, the CRC-32 of the feature or else of the reason; below, that of the key and `_NUMBERS`. A key is a
        # checksum of its path.
        "check_rest": pyarrow.uint64(),
    }
    return pyarrow.schema([key, *types.items()])


def damaged_keys(found: Any) -> list[int]:
    """Returns the keys of photos of which the codes, or sizes, times and dimensions, are not those that were written.

    Those without a code have no checksum of it. What is not among the columns is not checked.
    """
    damaged: list[int] = []
    if {"check", "code"} <= set(found.column_names):
        coded = found.filter(found["code"].is_valid())
        damaged += _differing(coded, "check", codes_of(coded))
    if {"check_rest", *_NUMBERS} <= set(found.column_names):
        numbers = np.stack([as_numpy(found[name].cast("int64")) for name in _NUMBERS], axis=1)
        damaged += _differing(found, "check_rest", numbers.astype("<i8").view(np.uint8))
    return damaged


def _differing(found: Any, check: str, content: UInt8[np.ndarray, "rows bytes"]) -> list[int]:
    """Returns the keys of rows for which CRC-32 of the key and some bytes is not the lower half of a checksum."""
    keys = as_numpy(found["key"])
    written = np.from_dlpack(found[check].combine_chunks())
    # CRC-32 by its table, for all photos at once: byte for byte as `zlib.crc32(content, key)`.
    table = np.array([~zlib.crc32(bytes([byte]), _HALF) & _HALF for byte in range(256)], np.uint32)
    crc = ~keys.astype(np.uint32)
    for column in content.T:
        crc = table[(crc ^ column) & 255] ^ (crc >> 8)
    return keys[~crc != written.astype(np.uint32)].tolist()


def validate_rows(found: Any, uri: str) -> None:
    """Raises an IndexFolderError if rows of an index are not those that were written.

    Checked are the columns that are there, beside codes; indexes of earlier versions lack some checksums.
    """
    names = set(found.column_names)
    again = "index the photos again, and these are encoded again"
    restore = "restore the index from a copy, or make it anew with --relearn"
    problems = {"a size, time or dimension": (again, bool(damaged_keys(found.drop_columns(list(names & {"code"})))))}
    if "path" in names:
        paths = map(path_of, found.select(["path", "raw_path"]).to_pylist())
        problems["a path"] = restore, list(map(key_of, paths)) != as_numpy(found["key"]).tolist()
    for name, check in (("thumbnail", "check"), ("feature", "check_rest"), ("reason", "check_rest")):
        if {name, check} <= names:
            values = (value.encode() if isinstance(value, str) else value or b"" for value in found[name].to_pylist())
            written = [value >> 32 for value in found[check].to_pylist()]
            problems[f"a {name}"] = restore, list(map(zlib.crc32, values)) != written
    for what, (remedy, is_damaged) in problems.items():
        if is_damaged:
            raise _error(f"{what} in {uri} is damaged on the disk; {remedy}")


def _present(columns: Iterable[str], table: Any) -> list[str]:
    """Returns the columns that a table has: indexes of earlier versions lack features and checksums."""
    return [name for name in columns if name in table.schema.names]


def _fetch(query: Any) -> Any:
    return query.limit(None).to_arrow()


def as_numpy(column: Any) -> Int64[np.ndarray, " rows"]:
    """Returns a column of numbers; not by Arrow's own `to_numpy`, which imports Pandas."""
    return np.from_dlpack(column.combine_chunks()).astype(np.int64)


def codes_of(found: Any) -> UInt8[np.ndarray, "rows bytes"]:
    """Returns the column of packed codes."""
    width = found.schema.field("code").type.list_size
    return np.from_dlpack(found["code"].combine_chunks().flatten()).reshape(-1, width)


# LanceDB: places, connections and errors.


def validate_installed() -> None:
    """Raises an IndexFolderError if LanceDB is not installed, without importing it: before minutes of learning."""
    if not is_installed("lancedb"):
        raise _error(_MISSING)


def normalize_uri(uri: pathlib.Path | str) -> str:
    """Returns the place that a user named, a folder as an absolute path."""
    text = os.fspath(uri)
    if not text:
        raise _error("it is empty; give a folder, or another place that LanceDB supports, such as s3://bucket/folder")
    return os.path.abspath(os.path.expanduser(text)) if is_local(text) else text


def is_local(uri: str) -> bool:
    """Returns whether a place is a folder of this machine."""
    return "://" not in uri


def _connect(uri: str) -> Any:
    """Returns LanceDB's connection to a place, and makes the folder if there is none."""
    lancedb = import_optional("lancedb", _error(_MISSING))
    with lance_errors(uri, "reached"):
        return lancedb.connect(uri)


def _table_names(connection: Any, uri: str) -> list[str]:
    names: list[str] = []
    with lance_errors(uri, "read"):
        while True:
            page = connection.list_tables(page_token=names[-1] if names else None, limit=100).tables
            names += page
            if len(page) < 100:
                return names


def _can_open(connection: Any, uri: str, name: str) -> bool:
    """Returns whether a listed table is complete; if its first writer was killed, LanceDB lists the remains."""
    with lance_errors(uri, "read"):
        try:
            connection.open_table(name)
        except Exception as error:  # LanceDB's errors have no class of their own
            if "was not found" in str(error):
                return False
            raise
    return True


@contextlib.contextmanager
def lance_errors(uri: str, action: str) -> Iterator[None]:
    """Converts any error of LanceDB into an IndexFolderError that says that the index cannot be `action`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # LanceDB's errors have no class of their own
        raise _lance_error(uri, action, error) from error


def _lance_error(uri: str, action: str, error: Exception) -> IndexFolderError:
    reason = "the disk is full" if "No space left on device" in str(error) else first_line(error).strip().rstrip(".")
    return _error(f"{uri} cannot be {action} ({reason}); repair that, and the same command goes on with what is there")


def _error(sentence: str) -> IndexFolderError:
    return IndexFolderError(f"--index: {sentence}", field="--index")
