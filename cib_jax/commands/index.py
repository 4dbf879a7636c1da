"""Whether an encoder, fields and photos that a user names agree with those that an index was made with."""

import dataclasses
import errno
import functools
import itertools
import os
import pathlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import rich.console
from jaxtyping import Bool, Int64, UInt8

from cib_jax import fitting
from cib_jax.config import build, schema
from cib_jax.config.schema import flatten
from cib_jax.console import print_message, progress_bar
from cib_jax.data import inputs
from cib_jax.data.inputs import Photos, Read
from cib_jax.distributed import sharding
from cib_jax.errors import ConfigError, DataError, IndexFolderError
from cib_jax.files import map_in_order, printable
from cib_jax.inference.hasher import Hasher
from cib_jax.losses import OBJECTIVES
from cib_jax.models import registry
from cib_jax.random_streams import stream_rng
from cib_jax.runs import context
from cib_jax.storage import collection, photo_table
from cib_jax.storage.photo_table import AT_ONCE, IndexMetadata, PhotoTable, Row, State, key_of
from cib_jax.training import grad_cache

# jobs.agreement: Whether an encoder, fields and photos that a user names agree with those that an index was made with.


OF_ENCODING = ("encode_batch", "data.max_megapixels", "devices", "backbone_weights")
"""Fields that can be set where the encoder is trained already."""


def given_flags(workdir: pathlib.Path | str, config: ml_collections.ConfigDict, overrides: dict[str, Any]) -> Hasher:
    """Returns the encoder that a user gives.

    Raises:
      TableError: it takes features.
      ConfigError: a field would shape another one.
      CheckpointError, SavedError, WeightsError: there is none in `workdir`.
    """
    workdir = pathlib.Path(workdir).expanduser()
    validate_overrides(overrides, f"the encoder in {workdir}")
    # Of one saved without its run, all weights lie beside it.
    hasher = Hasher.load(workdir, backbone_weights=config.backbone_weights)
    if hasher.encoder.backbone.takes != "images":
        raise IndexFolderError(
            f"--workdir: {workdir} was trained on features, and an index holds photos; give a run on images, or search "
            "features by cib_jax.Index"
        )
    return hasher


def validate_overrides(overrides: dict[str, Any], whose: str, learnt: dict[str, Any] | None = None) -> None:
    """Refuses fields that would shape another encoder; the command that had it learnt may be given again.

    Raises:
      ConfigError: there is one.
    """
    for name, value in overrides.items():
        if learnt and name not in OF_ENCODING and learnt.get(name, value) != value:
            raise ConfigError(
                f"config.{name}: {whose} was learnt with {learnt[name]!r}, not {value!r}; leave it out to go on with "
                "that, or give another --index"
            )
        if not learnt and name not in OF_ENCODING:
            raise ConfigError(
                f"config.{name}: {whose} is trained already; leave it out (what can be set: {', '.join(OF_ENCODING)})"
            )


def validate_same_encoder(table: PhotoTable, hasher: Hasher, workdir: pathlib.Path | str | None) -> None:
    """Refuses an encoder whose codes cannot be compared with those of the index.

    Raises:
      TableError: it is such a one.
    """
    ours, theirs = collection.encoder_identity(hasher), table.metadata.encoder
    other = [f"{name}: {theirs.get(name)} → {value}" for name, value in ours.items() if theirs.get(name) != value]
    if other:
        raise IndexFolderError(
            f"--workdir: {workdir} holds another encoder than the one that made {table.uri} ({'; '.join(other)}), so "
            "codes cannot be compared; leave it out to go on with the index's own, or give another --index"
        )


def validate_images(
    table: PhotoTable, found: Photos, known: Int64[np.ndarray, " known"], console: rich.console.Console
) -> None:
    """Takes up photos that were moved; refuses others.

    Args:
      table: the index.
      found: the photos that are to be indexed.
      known: keys of those that are.
      console: where to report.

    Raises:
      TableError: they are others.
    """
    before = table.metadata.images
    if before == found.place:
        return
    if os.path.exists(before):
        raise IndexFolderError(
            f"--images: {table.uri} is the index of {before}, which is still there; leave --images out to go on with "
            f"it, or give another --index for {found.place}"
        )
    # Its disk may only be away: taken for moved, all that is known of its photos would be lost.
    if len(known) and not np.isin(known, [key_of(name) for name in found.names]).any():
        raise IndexFolderError(
            f"--images: {table.uri} is the index of {before}, and none of its photos is in {found.place}; give the "
            "place where they lie now, or another --index"
        )
    print_message(console, f"The photos of {before} are taken to lie in {found.place} now, under the same names")
    table.move(found.place)


# jobs.changes: What came, changed or went among photos, by their files' sizes and times.


ABSENT, UNTOLD = -1, -2
"""In place of a size: the file is not there; the system does not say whether it is, as in a folder that is closed."""

_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


class Changes(NamedTuple):
    """What is to be done."""

    missing: list[int]
    """Files of which nothing is known."""
    changed: list[int]
    """Files that have another size or time than they had."""
    again: list[int]
    """Files that could not be read, which may have passed."""
    gone: list[int]
    """Keys of files that are not there any more."""
    absent: list[int]
    """Files that are listed, but not there."""
    untold: list[int]
    """Files that are listed, of which it cannot be told now whether they are there; what is known of them is kept."""


def compared(
    state: State,
    keys: Int64[np.ndarray, " files"],
    sizes: Int64[np.ndarray, " files"],
    modified: Int64[np.ndarray, " files"],
) -> tuple[Bool[np.ndarray, " files"], Bool[np.ndarray, " files"]]:
    """Returns which files are known, and which of them are as they were."""
    if not len(state.keys):
        return np.zeros(len(keys), bool), np.zeros(len(keys), bool)
    places = np.minimum(np.searchsorted(state.keys, keys), len(state.keys) - 1)
    known = state.keys[places] == keys
    return known, known & (state.sizes[places] == sizes) & (state.modified_ns[places] == modified)


def changes(
    table: PhotoTable,
    before: Int64[np.ndarray, " known"],
    found: Photos,
    keys: Int64[np.ndarray, " files"],
    sizes: Int64[np.ndarray, " files"],
    modified: Int64[np.ndarray, " files"],
) -> Changes:
    """Returns what is to be done to bring a table in step with files.

    Args:
      table: the index.
      before: keys that it held before the files were looked for. What another process has indexed since may have come
        since, too, so it is not gone for not being among them.
      found: the files.
      keys: of them.
      sizes: as `look` tells them.
      modified: the same.
    """
    state = table.state()
    known, same = compared(state, keys, sizes, modified)
    there = sizes >= 0
    listed = np.isin(before, keys[sizes != ABSENT])
    gone = before[~listed & np.isin(before, state.keys)].tolist()
    if found.closed:
        # What is in a folder that cannot be entered now may be there tomorrow.
        closed = tuple(f"{folder}/" for folder in found.closed)
        gone = [key_of(path) for path in table.paths(gone) if not path.startswith(closed)]
    again = np.isin(keys, state.keys[state.sizes < 0])
    which = (there & ~known, there & known & ~same & ~again, there & again, sizes == ABSENT, sizes == UNTOLD)
    missing, changed, tried, absent, untold = (np.flatnonzero(some).tolist() for some in which)
    return Changes(missing, changed, tried, gone, absent, untold)


def find_changes(root: str, names: Sequence[str]) -> tuple[Int64[np.ndarray, " files"], Int64[np.ndarray, " files"]]:
    """Returns size and time of change of every file, `ABSENT` or `UNTOLD` where it has none."""
    sizes, modified = np.full((2, len(names)), ABSENT, np.int64)
    paths = [os.path.join(root, name) for name in names]
    chunks = [range(start, min(start + 1000, len(paths))) for start in range(0, len(paths), 1000)]

    def of_some(numbers: range) -> list[tuple[int, int]]:
        return [size_and_time(paths[number]) for number in numbers]

    for numbers, pairs in map_in_order(of_some, chunks):
        sizes[numbers.start : numbers.stop], modified[numbers.start : numbers.stop] = np.array(pairs).T
    return sizes, modified


def size_and_time(path: str) -> tuple[int, int]:
    """Returns a file's size in bytes and time of change in nanoseconds since 1970; `ABSENT` or `UNTOLD` twice."""
    try:
        found = os.stat(path)
    except OSError as error:
        return (ABSENT, ABSENT) if error.errno in _NOT_THERE else (UNTOLD, UNTOLD)
    except ValueError:  # a list may name what no file can be called
        return ABSENT, ABSENT
    return found.st_size, found.st_mtime_ns


# Training of an encoder for the index, if none is given.


FEWEST = 16
"""The fewest photos to train on."""
FEW = 500
"""Number of photos below which a message says that they are few."""


def train_index_encoder(found: Photos, config: ml_collections.ConfigDict, console: rich.console.Console) -> Hasher:
    """Returns an encoder that was trained, without labels, on a random sample of the photos.

    Args:
      found: Photos; unreadable ones are left out.
      config: Config of an experiment on images; its `data.train_images` is the size of the sample, 0 for all photos.
      console: Console to report on.

    Raises:
      ConfigError: The config is for features, or a field does not fit the photos.
      DataError: There are fewer than 16 readable photos, or fewer than devices that share a batch.
      WeightsError: The backbone's weights are missing or unusable.
    """
    if config.backbone == "none":
        raise ConfigError("config.backbone must be a network for photos, got 'none'", field="config.backbone")
    context.print_weights_download(config, console)
    encoder, params, frozen, _ = build.encoder(config)
    images = _sample(found, config, console)
    if len(images) < FEWEST:
        raise DataError(
            f"--images must have at least {FEWEST} readable photos to train on, got {len(images)} in {found.place}; "
            "add some, or give --workdir=RUN, the folder of a trained run",
            field="--images",
        )
    few = ", which are few: more photos, or --workdir=RUN of a trained run, give better codes"
    print_message(
        console,
        f"No --workdir of a trained run: training {config.bits}-bit codes on {len(images):,} of the photos"
        f"{few if len(images) < FEW else ''}",
    )
    devices = sharding.mesh_size(sharding.local_mesh(config.devices))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.batch_size, config.micro_batch = batch_for(len(images), devices, config)
    mesh = sharding.make_mesh(config.devices, config.batch_size)
    grad_cache.validate_micro_batch(config.micro_batch, config.batch_size // sharding.mesh_size(mesh))
    views = config.train.views if config.frozen else 0
    with progress_bar(console, "Training: views", views * len(images)) as advance:
        data = fitting.load_data(
            images,
            build.method(config, encoder),
            frozen,
            views,
            build.key(config, "view bank"),
            config.devices,
            lambda more: advance(more, ""),
        )
    run = build.training_run(config, (encoder, params, frozen), data, mesh)
    teacher_run = None
    if OBJECTIVES[config.objective].taught:
        build.teacher(config).check(len(images))
        theirs = build.teacher_config(config)
        network = build.encoder(theirs, stream="teacher weights")[:3]
        teacher_run = build.training_run(theirs, network, data, mesh, stream="teacher steps")
    # A bar of its own: its images per second are not those of the views.
    with progress_bar(console, "Training: codes", config.epochs * len(images)) as advance:
        hasher = fitting.train_hasher(
            run, images, config.devices, lambda report: advance(len(images), ""), build.teacher(config), teacher_run
        )
    return dataclasses.replace(hasher, stored_size=images.shape[1], batch_size=config.encode_batch)


def batch_for(count: int, devices: int, config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Returns batch size and micro-batch: those of the config, or smaller ones that `count` photos allow."""
    if config.batch_size <= count:
        return config.batch_size, config.micro_batch
    # Whole parts on each device; all images at once if there are fewer than one part.
    part = config.micro_batch if devices * config.micro_batch <= count else 0
    unit = devices * max(part, 1)
    size = count // unit * unit
    if not size:
        raise DataError(
            f"--images must have at least as many readable photos as devices share a batch, {devices}, got {count}; "
            "set --config.devices=1, or give more photos",
            field="--images",
        )
    return size, part


def _sample(
    found: Photos, config: ml_collections.ConfigDict, console: rich.console.Console
) -> UInt8[np.ndarray, "images side side 3"]:
    """Returns random readable photos, as many as `data.train_images` says, in random order."""
    side = config.data.stored_size or config.image_size or registry.get(config.backbone).image_size
    wanted = min(config.data.train_images if config.data.train_images > 0 else len(found.names), len(found.names))
    order = stream_rng(config.data.seed, "index sample").permutation(len(found.names)).tolist()
    images = np.empty((wanted, side, side, 3), np.uint8)
    count = 0
    with progress_bar(console, "Reading some photos", wanted) as advance:
        # Numbers are drawn lazily, so that reading ends when there are enough readable photos.
        numbers = itertools.takewhile(lambda number: count < wanted, order)
        for _, read in dataclasses.replace(found, size=side, thumbnails=False).read([numbers]):
            if read.content is not None and count < wanted:
                images[count] = read.content
                count += 1
                advance(1, "")
    return images[:count]


# jobs.index: Photos indexed for searching: what came, changed or went since the last time is found, and only that redone.


BLOCK = 512
"""Files in a commit, about: what a killed process can lose."""
_TIDY_EVERY = 256
"""Commits after which small pieces are joined."""
_SHOWN = 5


class Indexed(NamedTuple):
    """What a run of the job did."""

    photos: int
    """In the index now, that can be searched."""
    added: int
    changed: int
    removed: int
    unreadable: int
    """Files in the index that are no readable photos."""


def index(
    uri: pathlib.Path | str,
    images: pathlib.Path | str | None = None,
    *,
    workdir: pathlib.Path | str | None = None,
    config: ml_collections.ConfigDict,
    overrides: dict[str, Any] | None = None,
    console: rich.console.Console | None = None,
) -> Indexed:
    """Brings an index in step with the photos; makes it if there is none.

    Each block of photos is one commit. Killed at any moment, the same call goes on; several processes that index the
    same photos at once share the work.

    Args:
      uri: of the index: a folder, or what else LanceDB takes.
      images: a folder of photos, or a .csv or .parquet list of them; None: that of the index.
      workdir: of a trained run, or the folder of a saved hasher; None: the index's own encoder, or for a new index one
        that is learnt from the photos.
      config: of the experiment by which that is learnt.
      overrides: which fields of `config` were set, by dotted name.
      console: where to report.

    Raises:
      TableError: LanceDB is not installed, or the index cannot be read or written, was made by another encoder, or of
        other photos.
      DataError: there are no photos, or they cannot be reached.
      ConfigError: a field cannot be set.
      CheckpointError, SavedError, WeightsError: there is no encoder in `workdir`.
    """
    named, uri, console = str(uri), photo_table.normalize_uri(uri), console or rich.console.Console()
    photo_table.validate_installed()
    schema.validate(config)
    given = given_flags(workdir, config, overrides or {}) if workdir is not None else None
    table = PhotoTable.open(uri) if PhotoTable.exists(uri) else None
    if table is None and images is None:
        raise IndexFolderError(f"--images: there is no index at {uri} yet; give the folder of photos to make one")
    if table is not None and given is not None:
        validate_same_encoder(table, given, workdir)
    place = str(images) if images is not None else table.metadata.images if table is not None else ""
    print_message(console, f"Looking through {place}")
    # Before the photos are looked for: what another process indexes while they are is not gone.
    before = table.state().keys if table is not None else np.zeros(0, np.int64)
    found = inputs.load_inputs(place, takes="images", size=1, max_megapixels=config.data.max_megapixels)
    assert isinstance(found, Photos)
    for note in found.notes:
        print_message(console, note)
    if table is None:
        made = given or train_index_encoder(found, config, console)
        learnt = {} if given else flatten(config)
        about = IndexMetadata(found.place, collection.encoder_identity(made), learnt)
        table = PhotoTable.create(uri, about, collection.hasher_bytes(made))
        if table.metadata.encoder != about.encoder:  # another process was faster
            if given:
                validate_same_encoder(table, given, workdir)
            validate_overrides(overrides or {}, f"the encoder of {uri}", table.metadata.learnt)
            print_message(console, "Another process made the index meanwhile; its encoder is taken")
    elif given is None:
        validate_overrides(overrides or {}, f"the encoder of {uri}", table.metadata.learnt)
    validate_images(table, found, before, console)
    found = dataclasses.replace(found, size=table.metadata.encoder["side"], thumbnails=True)
    return _Run(table, named, found, before, config, console).go()


class _Run:
    def __init__(
        self,
        table: PhotoTable,
        named: str,
        found: Photos,
        before: Int64[np.ndarray, " known"],
        config: ml_collections.ConfigDict,
        console: rich.console.Console,
    ):
        self.table, self.named, self.found, self.before = table, named, found, before
        self.config, self.console = config, console
        self.keys = np.array([key_of(name) for name in found.names], np.int64)
        if len(np.unique(self.keys)) != len(self.keys):
            raise DataError(
                f"--images: two paths of {found.place} have the same key, or one is listed twice; list each file once"
            )

    def go(self) -> Indexed:
        sizes, modified = find_changes(self.found.root, self.found.names)
        if not (sizes >= 0).any():
            raise DataError(
                f"--images: not one of the photos of {self.found.place} is there; mount their disk again, and the same "
                "command goes on"
            )
        found = changes(self.table, self.before, self.found, self.keys, sizes, modified)
        self._remove(found.gone)
        self.sizes, self.modified = sizes, modified
        todo = sorted([*found.missing, *found.changed, *found.again])
        if todo:
            self._make(todo)
            self.table.compact()
        for some, are in (
            (found.absent, "are not there"),
            (found.untold, "cannot be reached now, what is known of them is kept"),
        ):
            if some:
                first = printable(self.found.names[some[0]])
                print_message(self.console, f"{len(some):,} listed files {are}, the first: {first}")
        unreadable = self.table.unreadable()
        for path, reason in unreadable[:_SHOWN]:
            print_message(self.console, f"Cannot be read: {path}: {reason}")
        if len(unreadable) > _SHOWN:
            print_message(self.console, f"… and {len(unreadable) - _SHOWN:,} more")
        done = Indexed(
            len(self.table) - len(unreadable),
            len(found.missing),
            len(found.changed),
            len(found.gone),
            len(unreadable),
        )
        print_message(
            self.console,
            f"{done.photos:,} photos in {self.named}: {done.added:,} files new, {done.changed:,} changed, "
            f"{done.removed:,} gone, {done.unreadable:,} unreadable",
        )
        return done

    def _remove(self, gone: list[int]) -> None:
        for start in range(0, len(gone), AT_ONCE):
            self.table.remove(gone[start : start + AT_ONCE])

    @functools.cached_property
    def hasher(self) -> Hasher:
        # As it is kept there: another process may have made the index meanwhile.
        kept = collection.load_hasher(self.table)
        return dataclasses.replace(kept, batch_size=self.config.encode_batch, devices=self.config.devices)

    def _make(self, todo: list[int]) -> None:
        """Encodes and commits files, but for those that another process did meanwhile."""
        # Whole batches, since part of one takes as long.
        size = max(1, BLOCK // self.hasher.batch_size) * self.hasher.batch_size
        blocks = [todo[start : start + size] for start in range(0, len(todo), size)]
        # Each process begins somewhere else, so that several meet late.
        first = secrets.randbelow(len(blocks))
        blocks = blocks[first:] + blocks[:first]
        version, commits = self.table.version, 0
        with progress_bar(self.console, "Encoding photos", len(todo)) as bar:

            def due() -> Iterator[list[int]]:
                nonlocal version
                for block in blocks:
                    if self.table.version != version:
                        version = self.table.version
                        left = self._not_done(block)
                        bar(len(block) - len(left), "")
                        block = left  # noqa: PLW2901 - what is left of it
                    yield block

            # One stream over all blocks: the first photos of one are decoded while the last of another are encoded.
            of_block = {number: at for at, block in enumerate(blocks) for number in block}
            stream = self.found.read(due())
            for _, reads in itertools.groupby(stream, key=lambda pair: of_block[pair[0]]):
                rows, unread = self._rows(reads, lambda more: bar(more, ""))
                self.table.put(rows)
                now, commits = self.table.version, commits + 1
                # One more is this commit; of any other, what it did is to be found out.
                version = now if now == version + 1 else version
                if unread:
                    bar(unread, "")
                if commits % _TIDY_EVERY == 0:
                    self.table.compact()

    def _not_done(self, block: Sequence[int]) -> list[int]:
        numbers = np.asarray(block)
        _, same = compared(self.table.state(), self.keys[numbers], self.sizes[numbers], self.modified[numbers])
        return numbers[~same].tolist()

    def _rows(self, reads: Iterator[tuple[int, Read]], on_images: Callable[[int], None]) -> tuple[list[Row], int]:
        """Returns the rows of a block, and how many of its files have no code; encodes while it reads."""
        kept: list[tuple[int, Read]] = []

        def batches() -> Iterator[UInt8[np.ndarray, "batch side side 3"]]:
            squares = []
            for number, read in reads:
                kept.append((number, read._replace(content=None)))
                if read.decoded is not None:
                    squares.append(read.decoded.square)
                    if len(squares) == self.hasher.batch_size:
                        yield np.stack(squares)
                        squares = []
            if squares:
                yield np.stack(squares)

        # Of one size everywhere, so that a code does not depend on how the files are cut into blocks.
        encoded = self.hasher.encode_batches(batches(), on_images, size=self.hasher.batch_size)
        codes, rows = iter(encoded), []
        for number, read in kept:
            name = self.found.names[number]
            if read.size is None or read.modified_ns is None:
                continue  # it went meanwhile, which the next run sees
            if read.decoded is None:
                known = (-1, -1) if read.transient else (read.size, read.modified_ns)
                rows.append(Row(name, *known, reason=read.reason))
            else:
                seen_as = (read.decoded.width, read.decoded.height, read.decoded.thumbnail)
                rows.append(Row(name, read.size, read.modified_ns, next(codes).tobytes(), *seen_as))
        return rows, len(kept) - len(encoded)
