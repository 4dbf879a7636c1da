"""Codes of a corpus of any size: read, encoded and written part by part, by as many processes as there are."""

import dataclasses
import hashlib
import itertools
import json
import operator
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import PIL
import rich.console
from jaxtyping import Shaped

from cib_jax.commands.evaluate import overridden
from cib_jax.config import schema
from cib_jax.config.schema import flatten
from cib_jax.console import print_message, progress_bar
from cib_jax.data import inputs, photos
from cib_jax.data.inputs import Items, Read
from cib_jax.distributed.multihost import ProcessIndex, strided_share
from cib_jax.errors import CodeStoreError, DataError
from cib_jax.inference.hasher import Hasher
from cib_jax.inference.serialization import read_config
from cib_jax.models import weights
from cib_jax.storage import code_store
from cib_jax.storage.code_store import Corpus, DamagedPartError, File
from cib_jax.version import __version__

PART = 8192
"""Files whose codes make one file: what a killed process can lose."""


class Encoded(NamedTuple):
    """What is there when a process has done its share."""

    parts: int
    """Of the whole corpus."""
    made: int
    """Parts that this call made."""
    missing: int
    """Parts that other processes have not made yet."""
    files: int
    """In the parts that are there."""
    unreadable: int
    """Of these."""


def encode(
    workdir: pathlib.Path | str,
    images: pathlib.Path | str | None,
    codes: pathlib.Path | str,
    *,
    part: int = PART,
    place: ProcessIndex = ProcessIndex(0, 1),  # noqa: B008 - it cannot change
    overrides: dict[str, Any] | None = None,
    console: rich.console.Console | None = None,
) -> Encoded:
    """Writes the codes of this process's share of a corpus; what is there already is not made again.

    The corpus is cut into parts of `part` files; process i of n makes those whose number leaves i when divided by n.
    Nothing passes between processes but the files in `codes`, so they may start, die and start again in any order, with
    another n, too. `cib_jax.read_corpus` reads what they made.

    Args:
      workdir: of a run that was trained.
      images: a folder of photos, a .csv or .parquet list of them, or, for a run on features, a .npy of these. None goes
        on with the list that `codes` was begun with.
      codes: the folder for the codes.
      part: files in a part.
      place: which process this is, of how many that share the work; see `rendezvous.place`.
      overrides: config fields by dotted name, of those that do not change the run.
      console: where to report.

    Raises:
      CorpusError: `codes` holds something else, or cannot be written.
      CheckpointError, WeightsError: there is no trained run in `workdir`, or its backbone is not to be had.
      ConfigError, DataError: a field cannot be changed; `images` cannot be read.
    """
    workdir, folder = pathlib.Path(workdir).expanduser(), pathlib.Path(codes).expanduser()
    console = console or rich.console.Console()
    if part < 1:
        raise CodeStoreError(f"--part: {part} must be 1 or more files")
    trained = read_config(workdir)
    config = overridden(trained.copy_and_resolve_references(), overrides or {})
    schema.validate(config)
    hasher = Hasher.load(workdir, backbone_weights=config.backbone_weights)
    hasher = dataclasses.replace(hasher, batch_size=config.encode_batch)
    items = _items(images, folder, hasher, config)
    for note in items.notes:
        print_message(console, note)
    keep = isinstance(items, inputs.Photos)
    corpus = code_store.begin(folder, known(hasher, config), part, items.names, items.place, keep_list=keep)
    missing = []
    for number in strided_share(corpus.parts, place):
        try:
            there = corpus.load_part(number) is not None
        except DamagedPartError as error:
            print_message(console, f"{corpus.path(number)} is damaged ({error}) and is made again")
            corpus.path(number).unlink(missing_ok=True)
            there = False
        if not there:
            missing.append(number)
    made = _make(corpus, missing, items, hasher, console) if missing else 0
    return _concluded(corpus, made, items.words, console)


def _items(
    images: pathlib.Path | str | None, folder: pathlib.Path, hasher: Hasher, config: ml_collections.ConfigDict
) -> Items:
    takes, limit = hasher.encoder.backbone.takes, config.data.max_megapixels
    if images is not None:
        items = inputs.load_inputs(str(images), takes=takes, size=hasher.side, max_megapixels=limit)
        wanted = hasher.encoder.backbone.features
        if isinstance(items, inputs.Rows) and items.features.shape[-1] != wanted:
            raise DataError(
                f"--images: {items.place} holds {items.features.shape[-1]} features a row, but the run was trained on "
                f"{wanted}; compute them by the model that gave those"
            )
        return items
    if takes == "features":
        raise CodeStoreError("--images: it is missing; give the .npy of features to be encoded")
    if not (folder / code_store.DESCRIPTION).exists():
        raise CodeStoreError("--images: it is missing; give the folder of photos, or a .csv or .parquet list of them")
    begun = code_store.load_description(folder)
    return inputs.load_listed_photos(begun.images, code_store.load_names(begun), size=hasher.side, max_megapixels=limit)


def known(hasher: Hasher, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns what codes are known by: whatever else differs, they can be compared."""
    fields = {
        name: value
        for name, value in flatten(config).items()
        if name not in schema.MAY_CHANGE | schema.MEASURING
        # What earlier versions had no field for, they called the same encoder.
        and schema.ADDED.get(name) != value
    }
    known: dict[str, Any] = {
        "bits": hasher.encoder.bits,
        "parameters": weights.fingerprint({"trained": hasher.params, "frozen": hasher.frozen}),
        "config": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16],
    }
    backbone = hasher.encoder.backbone
    if backbone.takes == "images":
        return known | {"side": hasher.side, "decoder": photos.VERSION}
    return known | {"standard": weights.fingerprint({"mean": backbone.mean, "deviation": backbone.deviation})}


def _make(corpus: Corpus, missing: list[int], items: Items, hasher: Hasher, console: rich.console.Console) -> int:
    """Makes parts, but for those that another process makes meanwhile; returns how many."""
    made = 0
    made_with = {
        "cib-jax": __version__,
        "jax": jax.__version__,
        "pillow": PIL.__version__,
        "device": jax.devices()[0].device_kind,
    }
    total = sum(len(corpus.of_part(number)) for number in missing)
    with progress_bar(console, f"Encoding {items.words}", total) as bar:

        def moved(more: int) -> None:
            bar(more, "")

        def due() -> Iterator[range]:
            for number in missing:
                if corpus.path(number).exists():  # of another process with the same share
                    moved(len(corpus.of_part(number)))
                else:
                    yield corpus.of_part(number)

        # One stream over all parts: the first photos of one are decoded while the last of the one before are encoded.
        stream = items.read(due())
        for number, rows in itertools.groupby(stream, key=lambda pair: pair[0] // corpus.part):
            files: list[File] = []
            batches = _batches(map(operator.itemgetter(1), rows), hasher.batch_size, files, moved)
            # Of one size everywhere, so that a code does not depend on how the files are cut into parts.
            codes = hasher.encode_batches(batches, moved, size=hasher.batch_size)
            names = (items.names[index] for index in corpus.of_part(number))
            files = [file._replace(path=name) for file, name in zip(files, names, strict=True)]
            corpus.validate_folder()
            code_store.write_part(corpus.path(number), corpus.identity, files, codes, made_with)
            made += 1
    return made


def _batches(
    rows: Iterable[Read], size: int, files: list[File], moved: Callable[[int], None]
) -> Iterator[Shaped[np.ndarray, "batch ..."]]:
    """Yields what could be read, in batches, and puts what is to be kept of every file into `files`."""
    batch = []
    for row in rows:
        files.append(File("", row.size, row.modified_ns, row.reason))
        if row.content is None:
            moved(1)
            continue
        batch.append(row.content)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _concluded(corpus: Corpus, made: int, words: str, console: rich.console.Console) -> Encoded:
    counted = code_store.tally(corpus)
    if counted.missing:
        are = "is" if len(counted.missing) == 1 else "are"
        print_message(
            console,
            f"{_parts(made)} made; {len(counted.missing):,} of {_parts(corpus.parts)} {are} missing in "
            f"{corpus.folder}, which other processes make; where one of them was killed, start the same command again",
        )
    else:
        code_store.remove_temporary(corpus)
        print_message(
            console,
            f"{counted.files:,} {words} in {_parts(corpus.parts)}, {counted.unreadable:,} unreadable; the corpus in "
            f"{corpus.folder} is whole",
        )
    return Encoded(corpus.parts, made, len(counted.missing), counted.files, counted.unreadable)


def _parts(number: int) -> str:
    return f"{number:,} part" if number == 1 else f"{number:,} parts"
