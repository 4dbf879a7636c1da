"""The names of a corpus's files: kept beside its codes, known by a digest, compared with those of now."""

import dataclasses
import functools
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

from cib_jax.errors import CodeStoreError
from cib_jax.files import printable

# corpus.corpus_list: The names of a corpus's files: kept beside its codes, known by a digest, compared with those of now.


def digest(names: Sequence[str]) -> str:
    """Returns what names in an order are known by."""
    made = hashlib.blake2b(digest_size=16)
    for name in names:
        made.update(os.fsencode(name) + b"\0")
    return made.hexdigest()


def write_manifest(path: pathlib.Path, names: Sequence[str]) -> None:
    """Keeps the names in a Parquet file, as the bytes that the file system has.

    Raises:
      CorpusError: it cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"raw_path": pyarrow.array([os.fsencode(name) for name in names], pyarrow.binary())})
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, compression="zstd", use_dictionary=False)
    write_bytes(path, content.getbuffer())


def read_manifest(path: pathlib.Path, known_by: str) -> list[str]:
    """Returns the names that `write` kept, in order.

    Raises:
      CorpusError: there is no such file, or it does not hold the names with this digest.
    """
    import pyarrow.parquet

    try:
        names = [os.fsdecode(name) for name in pyarrow.parquet.read_table(path).column("raw_path").to_pylist()]
        if digest(names) != known_by:
            raise ValueError("it names other files")
    except Exception as error:  # whatever damaged bytes make Parquet's reader raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise CodeStoreError(
            f"--codes: {path}, which keeps the list of files, cannot be read ({type(error).__name__}: {first}); give "
            "the --images that the corpus was begun with, unchanged, or another --codes"
        ) from error
    return names


def changes(then: Sequence[str], now: Sequence[str]) -> str:
    """Returns, in words, how many names came and went, and the first of each."""
    before, after = set(then), set(now)
    came, went = [name for name in now if name not in before], [name for name in then if name not in after]
    return " and ".join(
        f"{len(some):,} {word} (the first: {printable(some[0])})"
        for some, word in ((came, "came"), (went, "went"))
        if some
    )


# corpus.corpus_parts: One part of a corpus's codes: a Parquet file that is there whole or not at all, and known when it was damaged.


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


def write_shard(
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


def read_header(path: pathlib.Path) -> Head:
    """Returns what a part says of itself.

    Raises:
      DamagedPartError: the end of the file, where it stands, is damaged.
      OSError: the file cannot be opened.
    """
    return _read(path, rows=False)[0]


def read_shard(path: pathlib.Path) -> tuple[Head, Part]:
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
        raise CodeStoreError(
            f"--codes: {path} cannot be written ({(error.strerror or str(error)).lower()}); make room or mend it, and "
            "the same command goes on after the parts that are there"
        ) from error


# corpus.corpus: Packed codes of a corpus of many files on disk: a folder of parts, filled by any number of processes, and read.


FORMAT = 1
# Programs that read a folder of Parquet files as one table look past names with an underscore.
ABOUT = "_corpus.json"
LIST = "_files.parquet"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A folder of codes: whose they are, of which files, cut into parts of how many."""

    folder: pathlib.Path
    encoder: dict[str, Any]
    """What the encoder, and what it is shown of a file, are known by."""
    part: int
    """Files in a part; the last has what is left."""
    files: int
    listed: str
    """Digest of the files' names, in order."""
    images: str
    """Where the files were when the corpus was begun; they may lie elsewhere by now."""

    @property
    def parts(self) -> int:
        """How many parts the files make."""
        return -(-self.files // self.part)

    @functools.cached_property
    def identity(self) -> str:
        """What every part of it carries."""
        return hashlib.sha256(json.dumps(self._known(), sort_keys=True).encode()).hexdigest()[:24]

    def _known(self) -> dict[str, Any]:
        known = {"format": FORMAT, "encoder": self.encoder, "part": self.part}
        return known | {"files": self.files, "parts": self.parts, "listed": self.listed}

    def described(self) -> dict[str, Any]:
        """Returns what _corpus.json holds."""
        return self._known() | {"images": self.images}

    def of_part(self, number: int) -> range:
        """Returns which files part `number` is of."""
        return range(number * self.part, min((number + 1) * self.part, self.files))

    def path(self, number: int) -> pathlib.Path:
        """Returns where part `number` lies, or will."""
        return self.folder / name(number)

    def find(self, number: int, *, rows: bool = True) -> tuple[Head, Part | None] | None:
        """Returns a part, or None where it is not there; without its rows it is not checked as a whole.

        Raises:
          CorpusError: it is of another corpus, or cannot be opened.
          DamagedPartError: it was damaged.
        """
        path = self.path(number)
        try:
            head, part = read_shard(path) if rows else (read_header(path), None)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CodeStoreError(
                f"--codes: {path} cannot be read ({(error.strerror or str(error)).lower()}); mend that first"
            ) from error
        if head.corpus != self.identity:
            raise CodeStoreError(
                f"--codes: {path} is of another corpus than {self.folder / ABOUT} tells; move it elsewhere, and the "
                "same command makes this one's"
            )
        if head.files != len(self.of_part(number)):
            raise DamagedPartError(f"{head.files} rows for {len(self.of_part(number))} files")
        return head, part

    def check(self) -> None:
        """Checks that the folder is still this corpus's.

        Raises:
          CorpusError: it is another's; the message says in what and what to do.
        """
        theirs = described(self.folder)
        if theirs.identity == self.identity:
            return
        where = f"--codes: {self.folder} holds"
        if told := _differences(self.encoder, theirs.encoder):
            raise CodeStoreError(
                f"{where} codes of another encoder ({told}); give the --workdir that they are of, or another --codes"
            )
        if theirs.part != self.part:
            raise CodeStoreError(
                f"{where} parts of {theirs.part} files, not of {self.part}; give --part={theirs.part}, or another "
                "--codes"
            )
        raise CodeStoreError(
            f"{where} codes of another list of files, {theirs.files:,} then and {self.files:,} now; give the --images "
            "that they are of, or another --codes"
        )


def begin(
    folder: pathlib.Path, encoder: dict[str, Any], part: int, names: Sequence[str], images: str, *, keep_list: bool
) -> Corpus:
    """Makes a folder the place of a corpus's codes, or checks that it is; any number of processes may do so at once.

    Args:
      folder: of the codes.
      encoder: what it is known by.
      part: files in a part.
      names: of all files, in order.
      images: where they are.
      keep_list: whether the names are kept, so that the corpus can be finished though files come and go.

    Raises:
      CorpusError: it holds something else, another corpus, or cannot be written to.
    """
    corpus = Corpus(folder, encoder, part, len(names), digest(names), images)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = sorted(os.listdir(folder))
    except OSError as error:
        raise CodeStoreError(
            f"--codes: {folder} cannot be used ({(error.strerror or str(error)).lower()}); choose another folder"
        ) from error
    if ABOUT not in inside:
        foreign = [name for name in inside if not name.startswith((".", "part-")) and name != LIST]
        if foreign:
            raise CodeStoreError(
                f"--codes: {folder} holds files, but no codes of a corpus ({foreign[0]}, …); choose another folder"
            )
        if keep_list:
            write_manifest(folder / LIST, names)
        text = json.dumps(corpus.described(), indent=2) + "\n"
        write_bytes(folder / ABOUT, text.encode())
    # Also of what was just written: another process may have written another corpus at the same moment. It checks again
    # before each part, and a part says which corpus it is of.
    theirs = described(folder)
    if keep_list and (theirs.encoder, theirs.part) == (encoder, part) and theirs.listed != corpus.listed:
        changed = changes(read_list(theirs), names)
        raise CodeStoreError(
            f"--images: the files are others than when {folder} was begun: {changed}; leave --images out to finish the "
            "list as it was and name what came in a list, --images=NEW.csv, for a folder of its own, or give another "
            "--codes"
        )
    corpus.check()
    return corpus


def described(folder: pathlib.Path) -> Corpus:
    """Returns the corpus that a folder's _corpus.json tells of.

    Raises:
      CorpusError: there is none, or it is damaged.
    """
    path = folder / ABOUT
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["format"] != FORMAT:
            raise CodeStoreError(f"--codes: {path} is of another version of this program; choose another folder")
        corpus = Corpus(folder, known["encoder"], known["part"], known["files"], known["listed"], known["images"])
        if not isinstance(corpus.encoder, dict) or corpus.part < 1 or corpus.parts != known["parts"]:
            raise ValueError("its numbers do not go together")
    except CodeStoreError:
        raise
    except OSError as error:
        raise CodeStoreError(
            f"--codes: {folder} is no folder of a corpus's codes ({ABOUT}: {(error.strerror or str(error)).lower()}); "
            "give one that --mode=encode has made"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CodeStoreError(
            f"--codes: {path} is damaged ({type(error).__name__}: {error}); remove it, and the same --mode=encode "
            "command writes it again and keeps the parts"
        ) from error
    return corpus


class Tally(NamedTuple):
    """How far a corpus is."""

    files: int
    """In the parts that are there."""
    unreadable: int
    """Of these."""
    missing: list[int]
    """Parts that are not there, or were damaged where even their end tells so."""


def tally(corpus: Corpus) -> Tally:
    """Returns how far a corpus is, by the ends of its parts alone.

    Raises:
      CorpusError: a part is of another corpus.
    """
    files = unreadable = 0
    missing = []
    for number in range(corpus.parts):
        try:
            found = corpus.find(number, rows=False)
        except DamagedPartError:
            found = None
        if found is None:
            missing.append(number)
        else:
            files, unreadable = files + found[0].files, unreadable + found[0].unreadable
    return Tally(files, unreadable, missing)


def tidy(corpus: Corpus) -> None:
    """Deletes what killed processes left of parts of a whole corpus; one that is at a part now finds it made."""
    for left in corpus.folder.glob(".part-*"):
        left.unlink(missing_ok=True)


def read_corpus(folder: pathlib.Path | str) -> tuple[list[str], UInt8[np.ndarray, "readable bytes"]]:
    """Returns the paths of all files of a finished corpus that have a code, in order, and their packed codes.

    Paths are relative to the folder of photos, or to that of the list, as they were encoded. Codes are [n, bits / 8].

    Raises:
      CorpusError: there is no corpus, parts are missing or damaged, or one is of another corpus.

    Examples:
      >>> import cib_jax as cib
      >>> paths, codes = cib.read_corpus("CODES")  # of --mode=encode
      >>> paths, codes.shape
      (['blue.png', 'green.png', 'red.png'], (3, 2))
    """
    folder = pathlib.Path(folder).expanduser()
    corpus = described(folder)
    counted = tally(corpus)
    again = "run the same --mode=encode command again, which makes what is missing"
    if counted.missing:
        raise CodeStoreError(
            f"--codes: {folder} is unfinished: {len(counted.missing):,} of {corpus.parts:,} parts are missing (the "
            f"first: {name(counted.missing[0])}); {again}"
        )
    paths: list[str] = []
    codes = np.empty((counted.files - counted.unreadable, corpus.encoder["bits"] // 8), np.uint8)
    for number in range(corpus.parts):
        try:
            found = corpus.find(number)
        except DamagedPartError as error:
            raise CodeStoreError(f"--codes: {corpus.path(number)} is damaged ({error}); {again}") from error
        assert found is not None and found[1] is not None
        part = found[1]
        codes[len(paths) : len(paths) + len(part.codes)] = part.codes
        paths += [file.path for file in part.files if not file.reason]
    return paths, codes


def read_list(corpus: Corpus) -> list[str]:
    """Returns the names of a corpus's files, in order, as they were when it was begun.

    Raises:
      CorpusError: they were not kept, or the file that keeps them is damaged.
    """
    return read_manifest(corpus.folder / LIST, corpus.listed)


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
    return "; ".join(f"{name}: {theirs.get(name)!r} → {mine.get(name)!r}" for name in names)
