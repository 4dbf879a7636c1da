"""Packed codes of a corpus of many files on disk: a folder of parts, filled by any number of processes, and read."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cib_jax.corpus import corpus_list, corpus_parts
from cib_jax.corpus.corpus_parts import CorpusError, DamagedPartError, Part

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
        return self.folder / corpus_parts.name(number)

    def find(self, number: int, *, rows: bool = True) -> tuple[corpus_parts.Head, Part | None] | None:
        """Returns a part, or None where it is not there; without its rows it is not checked as a whole.

        Raises:
          CorpusError: it is of another corpus, or cannot be opened.
          DamagedPartError: it was damaged.
        """
        path = self.path(number)
        try:
            head, part = corpus_parts.read(path) if rows else (corpus_parts.head(path), None)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CorpusError(
                f"--codes: {path} cannot be read ({(error.strerror or str(error)).lower()}); mend that first"
            ) from error
        if head.corpus != self.identity:
            raise CorpusError(
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
            raise CorpusError(
                f"{where} codes of another encoder ({told}); give the --workdir that they are of, or another --codes"
            )
        if theirs.part != self.part:
            raise CorpusError(
                f"{where} parts of {theirs.part} files, not of {self.part}; give --part={theirs.part}, or another "
                "--codes"
            )
        raise CorpusError(
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
    corpus = Corpus(folder, encoder, part, len(names), corpus_list.digest(names), images)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = sorted(os.listdir(folder))
    except OSError as error:
        raise CorpusError(
            f"--codes: {folder} cannot be used ({(error.strerror or str(error)).lower()}); choose another folder"
        ) from error
    if ABOUT not in inside:
        foreign = [name for name in inside if not name.startswith((".", "part-")) and name != LIST]
        if foreign:
            raise CorpusError(
                f"--codes: {folder} holds files, but no codes of a corpus ({foreign[0]}, …); choose another folder"
            )
        if keep_list:
            corpus_list.write(folder / LIST, names)
        text = json.dumps(corpus.described(), indent=2) + "\n"
        corpus_parts.write_bytes(folder / ABOUT, text.encode())
    # Also of what was just written: another process may have written another corpus at the same moment. It checks again
    # before each part, and a part says which corpus it is of.
    theirs = described(folder)
    if keep_list and (theirs.encoder, theirs.part) == (encoder, part) and theirs.listed != corpus.listed:
        changed = corpus_list.changes(read_list(theirs), names)
        raise CorpusError(
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
            raise CorpusError(f"--codes: {path} is of another version of this program; choose another folder")
        corpus = Corpus(folder, known["encoder"], known["part"], known["files"], known["listed"], known["images"])
        if not isinstance(corpus.encoder, dict) or corpus.part < 1 or corpus.parts != known["parts"]:
            raise ValueError("its numbers do not go together")
    except CorpusError:
        raise
    except OSError as error:
        raise CorpusError(
            f"--codes: {folder} is no folder of a corpus's codes ({ABOUT}: {(error.strerror or str(error)).lower()}); "
            "give one that --mode=encode has made"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(
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
        raise CorpusError(
            f"--codes: {folder} is unfinished: {len(counted.missing):,} of {corpus.parts:,} parts are missing (the "
            f"first: {corpus_parts.name(counted.missing[0])}); {again}"
        )
    paths: list[str] = []
    codes = np.empty((counted.files - counted.unreadable, corpus.encoder["bits"] // 8), np.uint8)
    for number in range(corpus.parts):
        try:
            found = corpus.find(number)
        except DamagedPartError as error:
            raise CorpusError(f"--codes: {corpus.path(number)} is damaged ({error}); {again}") from error
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
    return corpus_list.read(corpus.folder / LIST, corpus.listed)


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
    return "; ".join(f"{name}: {theirs.get(name)!r} → {mine.get(name)!r}" for name in names)
