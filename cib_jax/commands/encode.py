"""Encoding of a corpus of any size: read, encoded and written part by part, by any number of processes."""

import dataclasses
import hashlib
import itertools
import json
import operator
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import PIL
import rich.console
from jaxtyping import Shaped

from cib_jax.commands.evaluate import override_fields
from cib_jax.config import flatten, schema
from cib_jax.console import on_stdout, print_message, progress_bar
from cib_jax.data import inputs, photos
from cib_jax.data.inputs import Items, Read
from cib_jax.data.photo_folder import parse_patterns
from cib_jax.distributed import initialize
from cib_jax.distributed.multihost import strided_share
from cib_jax.errors import CodeStoreError, DataError
from cib_jax.files import count
from cib_jax.inference.hasher import Hasher
from cib_jax.inference.serialization import read_config
from cib_jax.models import weights
from cib_jax.storage import code_store
from cib_jax.storage.code_store import Corpus, DamagedPartError, File
from cib_jax.version import __version__

PART = 8192
"""Files whose codes go into one file, and so the most that a killed process loses."""


class Encoded(NamedTuple):
    """State of a corpus once a process has done its share.

    Counts all parts, those that this call `made`, those that other processes have not written yet (`missing`), the
    files in the parts that exist, and those of them that cannot be read.
    """

    parts: int
    made: int
    missing: int
    files: int
    unreadable: int


def encode(
    workdir: pathlib.Path | str,
    images: pathlib.Path | str | None,
    codes: pathlib.Path | str,
    *,
    part: int = PART,
    exclude: Sequence[str] | None = None,
    process: int | None = None,
    processes: int | None = None,
    overrides: dict[str, Any] | None = None,
    console: rich.console.Console | None = None,
) -> Encoded:
    """Writes the codes of this process's share of a corpus, except for parts that exist already.

    The corpus is cut into parts of `part` files; process i of n writes those with a number that leaves i when divided
    by n. Processes share nothing but the folder `codes`, so they may start, die and start again in any order, with
    another n as well. `cib_jax.read_corpus` reads the result.

    Args:
      workdir: Folder of a trained run.
      images: Folder of photos, a .csv or .parquet list of photos, or, for a run on features, a .npy of features. None:
        the list of photos with which `codes` was begun.
      codes: Folder for the codes.
      part: Files in a part.
      exclude: Shell patterns of files and folders that are left out, as in `cib_jax.index_photos`.
      process: Number of this process, from 0; None: as SLURM or Open MPI has set it, or 0.
      processes: Number of processes that share the work; None: as SLURM or Open MPI has set it, or 1.
      overrides: Values of config fields by dotted name, for fields that do not change the run.
      console: Console for messages.
    """
    workdir, folder = pathlib.Path(workdir).expanduser(), pathlib.Path(codes).expanduser()
    console = on_stdout(console)
    if part < 1:
        raise CodeStoreError(f"--part must be 1 file or more, got {part}; try {PART}", field="--part")
    place = initialize.process_index(process, processes)
    config = override_fields(read_config(workdir).copy_and_resolve_references(), overrides or {})
    schema.validate(config, trained=True)
    where = {"backbone_weights": config.backbone_weights, "checkpoint_dir": config.train.checkpoint_dir}
    hasher = Hasher.load(workdir, **where)
    hasher = dataclasses.replace(hasher, batch_size=config.encode_batch, devices=config.devices)
    items = _find_items(images, parse_patterns(exclude or ()), folder, hasher, config)
    if isinstance(items, inputs.Photos):
        items = dataclasses.replace(items, truncated=[] if config.data.truncated else None)
    for note in items.notes:
        print_message(console, note)
    keep = isinstance(items, inputs.Photos)
    corpus = code_store.begin(folder, _identity(hasher, config), part, items.names, items.place, keep_list=keep)
    missing = [number for number in strided_share(corpus.parts, place) if not _is_intact(corpus, number, console)]
    made = _write_parts(corpus, missing, items, hasher, console) if missing else 0
    if isinstance(items, inputs.Photos) and items.truncated:
        print_message(console, photos.truncated_note(items.truncated))
    return _summarize(corpus, made, items, console)


def _is_intact(corpus: Corpus, number: int, console: rich.console.Console) -> bool:
    """Returns whether a part exists; removes it if it is damaged."""
    try:
        return corpus.load_part(number) is not None
    except DamagedPartError as error:
        print_message(console, f"{corpus.path(number)} is damaged ({error}) and will be written again")
        corpus.path(number).unlink(missing_ok=True)
        return False


def _find_items(
    images: pathlib.Path | str | None,
    exclude: Sequence[str],
    folder: pathlib.Path,
    hasher: Hasher,
    config: ml_collections.ConfigDict,
) -> Items:
    takes, limit = hasher.encoder.backbone.takes, config.data.max_megapixels
    if images is not None:
        items = inputs.load_inputs(str(images), takes=takes, size=hasher.side, max_megapixels=limit, exclude=exclude)
        expected = hasher.encoder.backbone.features
        if isinstance(items, inputs.Rows) and (given := items.features.shape[-1]) != expected:
            raise DataError(
                f"--images must have {expected} features in a row, like the data of the run, got {given} in "
                f"{items.place}; compute them with the same model",
                field="--images",
            )
        return items
    if exclude:
        problem = f"--exclude must come with --images, got {exclude[0]!r}; the photos of {folder} were listed before"
        raise CodeStoreError(problem, field="--exclude")
    if takes == "features":
        raise CodeStoreError("--images is missing; give the .npy of features to encode", "--images")
    if not (folder / code_store.DESCRIPTION).exists():
        problem = "--images is missing; give the folder of photos, or a .csv or .parquet list of them"
        raise CodeStoreError(problem, field="--images")
    begun = code_store.load_description(folder)
    return inputs.load_listed_photos(begun.images, code_store.load_names(begun), size=hasher.side, max_megapixels=limit)


def _identity(hasher: Hasher, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns what two sets of codes must share to be comparable."""
    fields = {
        name: value
        for name, value in flatten(config).items()
        if name not in schema.MAY_CHANGE | schema.MEASURING
        # Configs of earlier versions lack these fields, and mean their defaults.
        and schema.ADDED.get(name) != value
    }
    identity: dict[str, Any] = {
        "bits": hasher.encoder.bits,
        "parameters": weights.fingerprint({"trained": hasher.params, "frozen": hasher.frozen}),
        "config": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16],
    }
    backbone = hasher.encoder.backbone
    if backbone.takes == "images":
        return identity | {"side": hasher.side, "decoder": photos.VERSION}
    return identity | {"standard": weights.fingerprint({"mean": backbone.mean, "deviation": backbone.deviation})}


def _write_parts(
    corpus: Corpus, missing: list[int], items: Items, hasher: Hasher, console: rich.console.Console
) -> int:
    """Writes parts, except for those that another process has written meanwhile; returns how many it wrote."""
    written = 0
    made_with = {"cib-jax": __version__, "jax": jax.__version__, "pillow": PIL.__version__}
    made_with["device"] = jax.devices()[0].device_kind
    total = sum(len(corpus.of_part(number)) for number in missing)
    with progress_bar(console, f"Encoding {items.noun}s", total, unit=f"{items.noun}s") as advance:

        def pending() -> Iterator[range]:
            for number in missing:
                if corpus.path(number).exists():  # written by another process with the same share
                    advance(len(corpus.of_part(number)))
                else:
                    yield corpus.of_part(number)

        # One stream over all parts, so that decoding one part overlaps with encoding the one before.
        stream = items.read(pending())
        for number, rows in itertools.groupby(stream, key=lambda pair: pair[0] // corpus.part):
            files: list[File] = []
            batches = _batches(map(operator.itemgetter(1), rows), hasher.batch_size, files, advance)
            # All batches have one size, so that a code does not depend on how the files are cut into parts.
            codes = hasher.encode_batches(batches, advance, size=hasher.batch_size)
            names = (items.names[index] for index in corpus.of_part(number))
            files = [file._replace(path=name) for file, name in zip(files, names, strict=True)]
            corpus.validate_folder()
            code_store.write_part(corpus.path(number), corpus.identity, files, codes, made_with)
            written += 1
    return written


def _batches(
    rows: Iterable[Read], size: int, files: list[File], advance: Callable[[int], None]
) -> Iterator[Shaped[np.ndarray, "batch ..."]]:
    """Returns the readable items in batches, which append the record of every file to `files` as they are read."""

    def readable() -> Iterator[Shaped[np.ndarray, "..."]]:
        for row in rows:
            files.append(File("", row.size, row.modified_ns, row.reason))
            if row.content is None:
                advance(1)
            else:
                yield row.content

    contents = readable()
    return map(np.stack, iter(lambda: list(itertools.islice(contents, size)), []))


def _summarize(corpus: Corpus, written: int, items: Items, console: rich.console.Console) -> Encoded:
    counted, parts = code_store.tally(corpus), count(corpus.parts, "part")
    if counted.missing:
        sentence = (
            f"{count(written, 'part')} written; {len(counted.missing):,} of {parts} missing in {corpus.folder}, left "
            "to other processes; if one of them was killed, start the same command again"
        )
    else:
        code_store.remove_temporary(corpus)
        found = f"{count(counted.files, items.noun)} in {parts}, {counted.unreadable:,} unreadable"
        sentence = f"{found}; the corpus in {corpus.folder} is complete"
        path = code_store.list_unreadable(corpus, items.closed if isinstance(items, inputs.Photos) else ())
        sentence += f"; {path} lists what cannot be read, with the reasons" if path else ""
    print_message(console, sentence)
    return Encoded(corpus.parts, written, len(counted.missing), counted.files, counted.unreadable)
