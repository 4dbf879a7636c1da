"""Copy of what a search for one photo needs of an index, read without LanceDB and Flax, whose imports take seconds.

Beside the tables of an index in a folder are the codes, features and metadata of its photos in one Arrow file, 1.3 kB a
photo, and its encoder as `Hasher.export` writes it. The copy is of one version
of the tables: it records the names of their files. Once these have changed, a search reads the tables themselves, until
the next update of the index writes the copy anew.
"""

import dataclasses
import hashlib
import json
import mmap
import os
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int8, Int64, UInt8

from cib_jax import exported
from cib_jax.errors import ExportedError
from cib_jax.exported import ExportedEncoder
from cib_jax.files import open_regular, replacing
from cib_jax.storage import photo_table
from cib_jax.storage.photo_table import ENCODER, PHOTOS, IndexMetadata, PhotoTable, Snapshot
from cib_jax.storage.rows import path_of

if TYPE_CHECKING:
    from cib_jax.inference.hasher import Hasher

ROWS = "search.arrow"
KEY = b"cib_jax.search.1"
COLUMNS = ["key", "code", "path", "raw_path", "size", "modified", "width", "height", "feature"]


class SearchCopy:
    """The photos of an index, with the methods of `PhotoTable` that a search without thumbnails calls."""

    def __init__(self, uri: str, metadata: IndexMetadata, rows: Any, encoder: ExportedEncoder):
        self.uri, self.metadata, self._rows, self._encoder = uri, metadata, rows, encoder
        self.has_features = "feature" in rows.column_names

    @classmethod
    def open(cls, uri: str) -> "SearchCopy | None":
        """Returns the copy of an index, or None if there is none of the tables as they are now."""
        import pyarrow
        import pyarrow.ipc

        try:
            with open_regular(pathlib.Path(uri, ROWS)) as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            rows = pyarrow.ipc.open_file(pyarrow.py_buffer(content)).read_all()
            rows.validate(full=True)
            about = json.loads(rows.schema.metadata[KEY])
            if about["files"] != _digest_of_files(uri) or about["checksum"] != _checksum(rows):
                return None
            metadata = photo_table.parse(about["index"])
            return cls(uri, metadata, rows, exported.load(_encoder_path(uri, metadata)))
        except (OSError, KeyError, TypeError, ValueError, AttributeError, ExportedError, pyarrow.ArrowException):
            return None  # damaged, or of another version: the tables have all that it has

    def encode_with_features(
        self, square: UInt8[np.ndarray, "1 side side 3"]
    ) -> tuple[UInt8[np.ndarray, "1 bytes"], Int8[np.ndarray, "1 features"]]:
        """Returns the code and the quantized features of one photo, as `Hasher.encode_with_features` does.

        Raises:
          ExportedError: The encoder was not exported for this kind of device.
        """
        codes, features = self._encoder.encode(square), self._encoder.features(square)
        largest = np.abs(features).max() or np.float32(1)
        return codes, np.round(features * (np.float32(127) / largest)).astype(np.int8)

    def encoder(self) -> bytes:
        """Returns the file of the encoder."""
        return PhotoTable.open(self.uri).encoder()

    def snapshot(self) -> Snapshot:
        """Returns all photos."""
        keys = photo_table.as_numpy(self._rows["key"])
        return Snapshot(keys, photo_table.codes_of(self._rows), np.arange(len(keys)), self)

    def paths_and_times(self, snapshot: Snapshot) -> tuple[list[str], Int64[np.ndarray, " photos"]]:
        """Returns the paths of all photos of a snapshot, in its order, and their times in nanoseconds since 1970."""
        rows = self._rows.select(["path", "raw_path", "modified"]).take(snapshot.rows)  # features take a gigabyte
        paths = [path_of(row) for row in rows.select(["path", "raw_path"]).to_pylist()]
        return paths, photo_table.as_numpy(rows["modified"])

    def read(self, snapshot: Snapshot, numbers: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Returns columns of some photos, by their position in the snapshot; times in nanoseconds since 1970."""
        rows = self._rows.select(columns)  # one by one: its method `take` imports Pandas
        return {number: rows.slice(snapshot.rows[number], 1).to_pylist()[0] for number in set(numbers)}


def is_current(table: PhotoTable) -> bool:
    """Returns whether an index in a folder has a copy of its tables as they are now."""
    return SearchCopy.open(table.uri) is not None


def write(table: PhotoTable, hasher: "Hasher") -> None:
    """Writes the copy of an index in a folder.

    Raises:
      OSError, ExportedError: A file cannot be written, or the encoder cannot be exported; there is then no copy.
    """
    import pyarrow
    import pyarrow.compute
    import pyarrow.ipc

    files = _digest_of_files(table.uri)  # first: a change from now on makes the copy one of an earlier version
    path = _encoder_path(table.uri, table.metadata)
    if not path.exists():
        dataclasses.replace(hasher, batch_size=1).export(path)
        # Compiled now, into the cache of programs if there is one, and not at the first search.
        exported.load(path).encode(np.zeros((1, hasher.side, hasher.side, 3), np.uint8))
    found = table.rows(COLUMNS)
    place = found.schema.get_field_index("modified")
    found = found.set_column(place, "modified", found["modified"].cast("int64"))
    # Of one width, since offsets end at 2 GiB, also those of `take`. A photo without features has none here, as in the
    # tables.
    if "feature" in found.column_names and (
        width := pyarrow.compute.max(pyarrow.compute.binary_length(found["feature"])).as_py()
    ):
        place = found.schema.get_field_index("feature")
        found = found.set_column(place, "feature", found["feature"].cast(pyarrow.binary(width)))
    found = found.take(np.argsort(photo_table.as_numpy(found["key"]))).combine_chunks()
    about = {"files": files, "index": json.loads(photo_table.serialize(table.metadata)), "checksum": _checksum(found)}
    found = found.replace_schema_metadata({KEY: json.dumps(about)})
    with replacing(pathlib.Path(table.uri, ROWS)) as part, pyarrow.ipc.new_file(str(part), found.schema) as writer:
        writer.write_table(found, max_chunksize=max(1, len(found)))


def _checksum(rows: Any) -> int:
    """Returns the CRC-32 of the content of all columns; a gigabyte takes a second."""
    checksum = 0
    for column in rows.columns:
        for buffer in column.combine_chunks().buffers():
            checksum = zlib.crc32(buffer or b"", checksum)
    return checksum


def _encoder_path(uri: str, metadata: IndexMetadata) -> pathlib.Path:
    """Returns the file of an index's encoder, which is named by its weights: no other encoder can be in its place."""
    weights = str(metadata.encoder.get("weights"))
    if not re.fullmatch("[0-9a-f]{16}", weights):
        raise ExportedError("the index does not know the weights of its encoder")
    return pathlib.Path(uri, f"search-{weights}.zip")


def _digest_of_files(uri: str) -> str:
    """Returns a digest of the names of the tables' files: each change writes files of new names."""
    folders = [
        pathlib.Path(uri, f"{table}.lance", part) for table in (ENCODER, PHOTOS) for part in ("_versions", "data")
    ]
    names = [sorted(os.listdir(folder)) for folder in folders if folder.exists()]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()
