"""One part of a corpus's codes: a Parquet file that is there whole or not at all, and known when it was damaged."""

import hashlib
import io
import json
import os
import pathlib
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cib_jax.data.names import printable
from cib_jax.errors import Refusal


class CorpusError(Refusal):
    """A folder of codes cannot be used; the message names it and what to do."""


class DamagedPartError(ValueError):
    """The file of a part is not what was written; the message says how, in a few words."""


class File(NamedTuple):
    """What is told of one file of the corpus beside its code."""

    path: str
    size: int | None
    """In bytes; None where it is not known."""
    modified_ns: int | None
    """Time of the last change, in nanoseconds since 1970; None where it is not known."""
    reason: str
    """Why it has no code; "" where it has one."""


class Head(NamedTuple):
    """What a part says of itself without its rows being read."""

    corpus: str
    files: int
    unreadable: int


class Part(NamedTuple):
    """All of a part."""

    files: list[File]
    codes: UInt8[np.ndarray, "readable bytes"]
    """Packed codes of the files without a reason, in their order."""


_KEY = b"cib_jax"


def name(number: int) -> str:
    """Returns the file name of part `number`."""
    return f"part-{number:08}.parquet"


def write(
    path: pathlib.Path,
    corpus: str,
    files: Sequence[File],
    codes: UInt8[np.ndarray, "readable bytes"],
    made_with: dict[str, str],
) -> None:
    """Writes a part atomically; of several processes that write it at once, one wins.

    Columns are `path`, `code` (fixed-size binary, null where there is none), `size` in bytes, `modified`, `reason`, and
    `raw_path`, null but for paths that are no valid text, whose bytes it holds.

    Args:
      path: of the file.
      corpus: what the corpus is known by.
      files: of this part, in order.
      codes: of those without a reason, in the same order.
      made_with: versions and device, for who wants to know.

    Raises:
      CorpusError: it cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    following = iter(codes)
    packed = [None if file.reason else next(following).tobytes() for file in files]
    valid = [_valid(file.path) for file in files]
    texts = [printable(file.path) for file in files]
    raw = [None if good else os.fsencode(file.path) for file, good in zip(files, valid, strict=True)]
    times = pyarrow.array([file.modified_ns for file in files], pyarrow.int64())
    about = {
        "corpus": corpus,
        "unreadable": sum(bool(file.reason) for file in files),
        "content": _digest(files, np.asarray(codes)),
        "made_with": made_with,
    }
    table = pyarrow.table(
        {
            "path": pyarrow.array(texts, pyarrow.string()),
            "code": pyarrow.array(packed, pyarrow.binary(codes.shape[1])),
            "size": pyarrow.array([file.size for file in files], pyarrow.int64()),
            "modified": times.cast(pyarrow.timestamp("ns", "UTC")),
            "reason": pyarrow.array([file.reason or None for file in files], pyarrow.string()),
            "raw_path": pyarrow.array(raw, pyarrow.binary()),
        },
        metadata={_KEY: json.dumps(about).encode()},
    )
    # In memory first: a full disk is then told by the system's own words, not by Parquet's.
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, compression="zstd", use_dictionary=["reason"])
    write_bytes(path, content.getbuffer())


def head(path: pathlib.Path) -> Head:
    """Returns what a part says of itself.

    Raises:
      DamagedPartError: the end of the file, where it stands, is damaged.
      OSError: the file cannot be opened.
    """
    return _read(path, rows=False)[0]


def read(path: pathlib.Path) -> tuple[Head, Part]:
    """Returns all of a part, checked.

    Raises:
      DamagedPartError: what is read is not what was written.
      OSError: the file cannot be opened.
    """
    about, part = _read(path, rows=True)
    assert part is not None
    return about, part


def _read(path: pathlib.Path, *, rows: bool) -> tuple[Head, Part | None]:
    import pyarrow.parquet

    with path.open("rb") as content:
        try:
            file = pyarrow.parquet.ParquetFile(content)
            about = json.loads(file.schema_arrow.metadata[_KEY])
            told = Head(str(about["corpus"]), file.metadata.num_rows, int(about["unreadable"]))
            if not rows:
                return told, None
            part = _part(file.read())
            if _digest(*part) != about["content"]:
                raise ValueError("its content is not what was written")
            return told, part
        except Exception as error:  # whatever damaged bytes make Parquet's reader raise
            first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
            raise DamagedPartError(f"{type(error).__name__}: {first}") from error


def _part(table: Any) -> Part:
    import pyarrow

    of = {column: table.column(column).to_pylist() for column in ("path", "code", "size", "reason", "raw_path")}
    times = table.column("modified").cast(pyarrow.int64()).to_pylist()
    paths = [text if raw is None else os.fsdecode(raw) for text, raw in zip(of["path"], of["raw_path"], strict=True)]
    reasons = [reason or "" for reason in of["reason"]]
    width = table.schema.field("code").type.byte_width
    codes = np.frombuffer(b"".join(code for code in of["code"] if code is not None), np.uint8).reshape(-1, width)
    if [code is None for code in of["code"]] != [bool(reason) for reason in reasons]:
        raise ValueError("codes stand at other files than were readable")
    return Part([File(*file) for file in zip(paths, of["size"], times, reasons, strict=True)], codes)


def _digest(files: Sequence[File], codes: UInt8[np.ndarray, "readable bytes"]) -> str:
    """Returns a digest of all that a part holds: Parquet has none of its own that is always looked at."""
    digest = hashlib.blake2b(json.dumps([list(file) for file in files]).encode(), digest_size=16)
    digest.update(repr(codes.shape).encode())
    digest.update(np.ascontiguousarray(codes).tobytes())
    return digest.hexdigest()


def _valid(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_bytes(path: pathlib.Path, content: bytes | memoryview) -> None:
    """Writes a file of a corpus atomically, under a name of this call's own until it is whole.

    What processes that were killed left of the same file is tidied away.

    Raises:
      CorpusError: it cannot be written; the message says why.
    """
    # No process number: processes of several machines may have the same.
    mine = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        try:
            with mine.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # where a disk over a network tells that it is full
            os.replace(mine, path)
        except FileNotFoundError:
            # Another process wrote the same file meanwhile, and took this one's for what a killed one had left.
            if not path.exists():
                raise
        finally:
            mine.unlink(missing_ok=True)
        for left in path.parent.glob(f".{path.name}.*"):
            left.unlink(missing_ok=True)
    except OSError as error:
        raise CorpusError(
            f"--codes: {path} cannot be written ({(error.strerror or str(error)).lower()}); make room or mend it, and "
            "the same command goes on after the parts that are there"
        ) from error
