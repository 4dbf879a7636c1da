"""Packed codes of a corpus on disk: a folder of Parquet files, written by any number of processes.

The files of a corpus are cut into parts of equal size, and each part is one Parquet file that is complete or absent.
`_corpus.json` describes the corpus and `_files.parquet` is the manifest, the list of all file names. Functions raise a
CodeStoreError if the folder holds something else or another corpus, or cannot be read or written.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cib_jax.codes import byte_count
from cib_jax.data.dataset import Unreadable, write_unreadable
from cib_jax.errors import CodeStoreError
from cib_jax.files import count, first_line, open_regular, printable, read_json, short_reason, write_bytes
from cib_jax.storage.rows import file_columns, path_of

FORMAT = 1
# Programs that read a folder of Parquet files as one table ignore names that begin with an underscore.
DESCRIPTION = "_corpus.json"
MANIFEST = "_files.parquet"
UNREADABLE = "_unreadable.csv"
# Key of the JSON in the metadata of a part.
_KEY = b"cib_jax"


class DamagedPartError(ValueError):
    """A part does not hold what was written; the message says how, in a few words."""


class File(NamedTuple):
    """One file of a corpus; size in bytes and time of the last change, since 1970, are None if not known."""

    path: str
    size: int | None
    modified_ns: int | None
    reason: str
    """Why it has no code; "" if it has one."""


class Part(NamedTuple):
    """A part of a corpus: its header, and unless only that was read, its files and the codes of the readable ones."""

    corpus: str
    """Identity of the corpus."""
    total: int
    unreadable: int
    files: Sequence[File] = ()
    codes: UInt8[np.ndarray, "readable bytes"] | None = None


class Tally(NamedTuple):
    """Numbers of files and of unreadable ones in the parts that exist, and the parts that are missing or damaged."""

    files: int
    unreadable: int
    missing: list[int]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Description of a folder of codes."""

    folder: pathlib.Path
    encoder: dict[str, Any]
    """Identity of the encoder and of its input, which all codes have in common."""
    part: int
    """Number of files in a part; the last one may have fewer."""
    files: int
    listed: str
    """Digest of the file names, in order."""
    images: str
    """Place of the files when the corpus was begun; they may be elsewhere now."""

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.files // self.part)

    @functools.cached_property
    def identity(self) -> str:
        """Digest of everything but the place of the files; each part carries it."""
        fields = {name: value for name, value in self.description().items() if name != "images"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:24]

    def description(self) -> dict[str, Any]:
        """Returns the content of `_corpus.json`."""
        known = {"format": FORMAT, "encoder": self.encoder, "part": self.part, "files": self.files}
        return known | {"parts": self.parts, "listed": self.listed, "images": self.images}

    def of_part(self, number: int) -> range:
        """Returns the positions of the files of a part."""
        return range(number * self.part, min((number + 1) * self.part, self.files))

    def path(self, number: int) -> pathlib.Path:
        """Returns the path of a part, whether it exists or not."""
        return self.folder / f"part-{number:08}.parquet"

    def load_part(self, number: int, *, rows: bool = True) -> Part | None:
        """Returns a part, None if it does not exist; without `rows` only its header, so that damage may be missed."""
        path = self.path(number)
        try:
            part = read_part(path, rows=rows)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _error(f"{path} cannot be read ({short_reason(error)}); repair that first") from error
        if part.corpus != self.identity:
            raise _error(
                f"{path} is of another corpus than the one in {self.folder / DESCRIPTION}; move it elsewhere, and the "
                "same command makes this corpus's part"
            )
        if part.total != len(self.of_part(number)):
            raise DamagedPartError(f"{part.total} rows for {len(self.of_part(number))} files")
        return part

    def validate_folder(self) -> None:
        """Raises a CodeStoreError if the folder does not hold this corpus any more."""
        theirs = load_description(self.folder)
        if theirs.identity == self.identity:
            return
        mine = self.encoder | {name: None for name in theirs.encoder if name not in self.encoder}
        differences = [
            f"{name}: {theirs.encoder.get(name)!r} → {value!r}"
            for name, value in mine.items()
            if theirs.encoder.get(name) != value
        ]
        if differences:
            content = f"codes of another encoder ({'; '.join(differences)}); give the --workdir of that encoder"
        elif theirs.part != self.part:
            content = f"parts of {theirs.part} files, not of {self.part}; give --part={theirs.part}"
        else:
            numbers = f"{theirs.files:,} then and {self.files:,} now"
            content = f"codes of another list of files, {numbers}; give the --images of that list"
        raise _error(f"{self.folder} holds {content}, or another --codes")


def begin(
    folder: pathlib.Path, encoder: dict[str, Any], part: int, names: Sequence[str], images: str, *, keep_list: bool
) -> Corpus:
    """Begins a corpus in a folder, or checks that the folder holds it; any number of processes may do so at once.

    With `keep_list`, the names are kept, so that the corpus can be finished even if files come and go.
    """
    import pyarrow

    corpus = Corpus(folder, encoder, part, len(names), _digest_names(names), images)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = sorted(os.listdir(folder))
    except OSError as error:
        raise _error(f"{folder} cannot be used ({short_reason(error)}); choose another folder") from error
    if DESCRIPTION not in inside:
        foreign = [
            name for name in inside if not name.startswith((".", "part-")) and name not in (MANIFEST, UNREADABLE)
        ]
        if foreign:
            raise _error(f"{folder} holds files, but no codes of a corpus ({foreign[0]}, …); choose another folder")
        if keep_list:
            raw = pyarrow.array([os.fsencode(name) for name in names], pyarrow.binary())
            _write_table(folder / MANIFEST, pyarrow.table({"raw_path": raw}), use_dictionary=False)
        _write_file(folder / DESCRIPTION, (json.dumps(corpus.description(), indent=2) + "\n").encode())
    # Read again even if just written: another process may have written another corpus at the same moment. Each process
    # also checks before each part, and a part carries the identity of its corpus.
    theirs = load_description(folder)
    if keep_list and (theirs.encoder, theirs.part) == (encoder, part) and theirs.listed != corpus.listed:
        changes = _format_changes(load_names(theirs), names)
        raise CodeStoreError(
            f"--images: the files are others than when {folder} was begun: {changes}; leave --images out to finish the "
            "list as it was and name what came in a list, --images=NEW.csv, for a folder of its own, or give another "
            "--codes",
            field="--images",
        )
    corpus.validate_folder()
    return corpus


def load_description(folder: pathlib.Path) -> Corpus:
    """Returns the corpus that the `_corpus.json` of a folder describes."""
    path = folder / DESCRIPTION
    try:
        known = read_json(path)
        if known["format"] != FORMAT:
            raise _error(f"{path} is of another version of this program; choose another folder")
        corpus = Corpus(folder, known["encoder"], known["part"], known["files"], known["listed"], known["images"])
        numbers = corpus.encoder["bits"], corpus.part, corpus.files, known["parts"]
        if not all(type(number) is int and number >= 0 for number in numbers) or corpus.encoder["bits"] < 1:
            raise ValueError("its numbers are not natural")
        if corpus.part < 1 or corpus.parts != known["parts"]:
            raise ValueError("its numbers do not agree")
    except CodeStoreError:
        raise
    except OSError as error:
        raise _error(
            f"{folder} is not a folder of a corpus's codes ({DESCRIPTION}: {short_reason(error)}); give one that "
            "--mode=encode has made"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _error(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it, and the same --mode=encode command "
            "writes it again and keeps the parts"
        ) from error
    return corpus


def tally(corpus: Corpus) -> Tally:
    """Returns the progress of a corpus, from the headers of its parts alone."""
    parts: dict[int, Part | None] = dict.fromkeys(range(corpus.parts))
    for number in parts:
        with contextlib.suppress(DamagedPartError):
            parts[number] = corpus.load_part(number, rows=False)
    existing = [part for part in parts.values() if part]
    missing = [number for number, part in parts.items() if not part]
    return Tally(sum(part.total for part in existing), sum(part.unreadable for part in existing), missing)


def list_unreadable(corpus: Corpus, closed: Sequence[Unreadable] = ()) -> pathlib.Path | None:
    """Writes the list of the files of a finished corpus that cannot be read, and of folders that are `closed`.

    Returns the path of the list, or None if there is nothing to list.
    """
    files = list(closed)
    for number in range(corpus.parts):
        with contextlib.suppress(DamagedPartError):
            if (header := corpus.load_part(number, rows=False)) and header.unreadable:
                part = corpus.load_part(number)
                files += [Unreadable(file.path, file.reason) for file in (part.files if part else ()) if file.reason]
    path = corpus.folder / UNREADABLE
    write_unreadable(path, files)
    return path if files else None


def remove_temporary(corpus: Corpus) -> None:
    """Deletes temporary files that killed processes left; a process that writes one now finds its part complete."""
    for left in corpus.folder.glob(".part-*"):
        left.unlink(missing_ok=True)


def read_corpus(folder: pathlib.Path | str) -> tuple[list[str], UInt8[np.ndarray, "readable bytes"]]:
    """Returns the paths of all files of a finished corpus that have a code, in order, and their packed codes.

    Args:
      folder: Folder of the codes.

    Returns:
      Paths, relative to the folder of photos or to that of the list, as they were encoded; codes [n, bytes].

    Raises:
      CodeStoreError: There is no corpus, parts are missing or damaged, or one is of another corpus.

    Examples:
      >>> import cib_jax as cib
      >>> paths, codes = cib.read_corpus("CODES")  # of --mode=encode
      >>> paths, codes.shape
      (['blue.png', 'green.png', 'red.png'], (3, 2))
    """
    folder = pathlib.Path(folder).expanduser()
    corpus = load_description(folder)
    missing = tally(corpus).missing
    remedy = "run the same --mode=encode command again, which makes what is missing"
    if missing:
        raise _error(
            f"{folder} is unfinished: {len(missing):,} of {count(corpus.parts, 'part')} missing (the first: "
            f"{corpus.path(missing[0]).name}); {remedy}"
        )
    paths: list[str] = []
    codes = np.empty((corpus.files, byte_count(corpus.encoder["bits"])), np.uint8)
    for number in range(corpus.parts):
        try:
            part = corpus.load_part(number)
        except DamagedPartError as error:
            raise _error(f"{corpus.path(number)} is damaged ({error}); {remedy}") from error
        assert part is not None and part.codes is not None
        codes[len(paths) : len(paths) + len(part.codes)] = part.codes
        paths += [file.path for file in part.files if not file.reason]
    return paths, codes[: len(paths)]


# The manifest.


def load_names(corpus: Corpus) -> list[str]:
    """Returns the names of a corpus's files, in order, as they were when it was begun."""
    import pyarrow.parquet

    path = corpus.folder / MANIFEST
    try:
        names = [os.fsdecode(name) for name in pyarrow.parquet.read_table(path).column("raw_path").to_pylist()]
        if _digest_names(names) != corpus.listed:
            raise ValueError("it names other files")
    except Exception as error:  # Parquet's reader raises any class for damaged bytes
        raise _error(
            f"{path}, which keeps the list of files, cannot be read ({type(error).__name__}: {first_line(error)}); "
            "give the --images that the corpus was begun with, unchanged, or another --codes"
        ) from error
    return names


def _digest_names(names: Sequence[str]) -> str:
    return hashlib.blake2b(b"".join(os.fsencode(name) + b"\0" for name in names), digest_size=16).hexdigest()


def _format_changes(then: Sequence[str], now: Sequence[str]) -> str:
    """Returns, in words, the numbers of names that came and went, and the first of each."""
    before, after = set(then), set(now)
    came, went = [name for name in now if name not in before], [name for name in then if name not in after]
    return " and ".join(
        f"{len(some):,} {word} (the first: {printable(some[0])})"
        for some, word in ((came, "came"), (went, "went"))
        if some
    )


# Parts.


def write_part(
    path: pathlib.Path,
    corpus: str,
    files: Sequence[File],
    codes: UInt8[np.ndarray, "readable bytes"],
    made_with: dict[str, str],
) -> None:
    """Writes a part, for the corpus of this identity, atomically; of several processes that write it at once, one wins.

    The columns are those of `file_columns` and `code`, fixed-size binary, null for a file that cannot be read.
    `made_with` are versions and device, for information.
    """
    import pyarrow

    remaining = iter(codes)
    packed = [None if file.reason else next(remaining).tobytes() for file in files]
    columns = file_columns(*zip(*files, strict=True))
    columns["code"] = pyarrow.array(packed, pyarrow.binary(codes.shape[1]))
    metadata = {
        "corpus": corpus,
        "unreadable": sum(bool(file.reason) for file in files),
        "content": _digest_rows(files, np.asarray(codes)),
        "made_with": made_with,
    }
    order = ("path", "code", "size", "modified", "reason", "raw_path")
    table = pyarrow.table({name: columns[name] for name in order}, metadata={_KEY: json.dumps(metadata).encode()})
    _write_table(path, table, use_dictionary=["reason"])


def read_part(path: pathlib.Path, *, rows: bool = True) -> Part:
    """Returns a part, checked; without `rows` only its header."""
    import pyarrow
    import pyarrow.parquet

    with open_regular(path) as content:
        try:
            file = pyarrow.parquet.ParquetFile(content)
            metadata = json.loads(file.schema_arrow.metadata[_KEY])
            header = Part(str(metadata["corpus"]), file.metadata.num_rows, int(metadata["unreadable"]))
            if not rows:
                return header
            table = file.read()
            at = table.schema.get_field_index("modified")
            records = table.set_column(at, "modified", table["modified"].cast(pyarrow.int64())).to_pylist()
            files = [File(path_of(row), row["size"], row["modified"], row["reason"] or "") for row in records]
            packed = [row["code"] for row in records]
            if [code is None for code in packed] != [bool(file.reason) for file in files]:
                raise ValueError("its codes do not belong to the readable files")
            width = table.schema.field("code").type.byte_width
            codes = np.frombuffer(b"".join(code for code in packed if code is not None), np.uint8).reshape(-1, width)
            agrees = (len(files), len(files) - len(codes)) == (header.total, header.unreadable)
            if not agrees or _digest_rows(files, codes) != metadata["content"]:
                raise ValueError("its content is not what was written")
            return header._replace(files=files, codes=codes)
        except Exception as error:  # Parquet's reader raises any class for damaged bytes
            raise DamagedPartError(f"{type(error).__name__}: {first_line(error)}") from error


def _digest_rows(files: Sequence[File], codes: UInt8[np.ndarray, "readable bytes"]) -> str:
    # Parquet's own checksums are of pages alone: they leave out the schema and the headers of pages.
    rows = json.dumps([list(file) for file in files]) + repr(codes.shape)
    return hashlib.blake2b(rows.encode() + codes.tobytes(), digest_size=16).hexdigest()


# Writing, and what can go wrong.


def _write_table(path: pathlib.Path, table: Any, use_dictionary: bool | list[str]) -> None:
    import pyarrow.parquet

    # In memory first: a full disk is then reported by the system's error, not by Parquet's.
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, compression="zstd", use_dictionary=use_dictionary)
    _write_file(path, content.getvalue())


def _write_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file atomically, and removes temporary files of it that killed processes left."""
    try:
        try:
            write_bytes(path, content)
        except FileNotFoundError:
            # Another process wrote the same file meanwhile and removed this one's temporary file as a leftover.
            if not path.exists():
                raise
        for left in path.parent.glob(f".{path.name}.*"):
            left.unlink(missing_ok=True)
    except OSError as error:
        raise _error(
            f"{path} cannot be written ({short_reason(error)}); make room or repair it, and the same command goes on "
            "after the parts that exist"
        ) from error


def _error(sentence: str) -> CodeStoreError:
    return CodeStoreError(f"--codes: {sentence}", field="--codes")
