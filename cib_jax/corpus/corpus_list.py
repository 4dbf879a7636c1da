"""The names of a corpus's files: kept beside its codes, known by a digest, compared with those of now."""

import hashlib
import io
import os
import pathlib
from collections.abc import Sequence

from cib_jax.corpus.corpus_parts import CorpusError, write_bytes
from cib_jax.data.names import printable


def digest(names: Sequence[str]) -> str:
    """Returns what names in an order are known by."""
    made = hashlib.blake2b(digest_size=16)
    for name in names:
        made.update(os.fsencode(name) + b"\0")
    return made.hexdigest()


def write(path: pathlib.Path, names: Sequence[str]) -> None:
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


def read(path: pathlib.Path, known_by: str) -> list[str]:
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
        raise CorpusError(
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
