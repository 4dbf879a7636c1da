"""Photos indexed for searching: what came, changed or went since the last time is found, and only that redone."""

import dataclasses
import functools
import itertools
import pathlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import rich.console
from jaxtyping import Int64, UInt8

from cib_jax.collection import collection, lance
from cib_jax.collection.lance import TableError
from cib_jax.collection.photo_rows import Row, key_of
from cib_jax.collection.photo_table import AT_ONCE, About, PhotoTable
from cib_jax.config import checking
from cib_jax.config.flat import flatten
from cib_jax.data import items as items_lib
from cib_jax.data.images import DataError
from cib_jax.data.items import Photos, Read
from cib_jax.data.names import printable
from cib_jax.hashing.hasher import Hasher
from cib_jax.jobs import agreement, progress
from cib_jax.jobs.changes import changes, compared, look
from cib_jax.jobs.learn import learn
from cib_jax.jobs.presenting import say

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
    named, uri, console = str(uri), lance.place_of(uri), console or rich.console.Console()
    lance.check_installed()
    checking.check(config)
    given = agreement.given(workdir, config, overrides or {}) if workdir is not None else None
    table = PhotoTable.open(uri) if PhotoTable.exists(uri) else None
    if table is None and images is None:
        raise TableError(f"--images: there is no index at {uri} yet; give the folder of photos to make one")
    if table is not None and given is not None:
        agreement.check_same(table, given, workdir)
    place = str(images) if images is not None else table.about.images if table is not None else ""
    say(console, f"Looking through {place}")
    # Before the photos are looked for: what another process indexes while they are is not gone.
    before = table.state().keys if table is not None else np.zeros(0, np.int64)
    found = items_lib.find(place, takes="images", size=1, max_megapixels=config.data.max_megapixels)
    assert isinstance(found, Photos)
    for note in found.notes:
        say(console, note)
    if table is None:
        made = given or learn(found, config, console)
        learnt = {} if given else flatten(config)
        about = About(found.place, collection.known_by(made), learnt)
        table = PhotoTable.create(uri, about, collection.file_of(made))
        if table.about.encoder != about.encoder:  # another process was faster
            if given:
                agreement.check_same(table, given, workdir)
            agreement.check_overrides(overrides or {}, f"the encoder of {uri}", table.about.learnt)
            say(console, "Another process made the index meanwhile; its encoder is taken")
    elif given is None:
        agreement.check_overrides(overrides or {}, f"the encoder of {uri}", table.about.learnt)
    agreement.check_images(table, found, before, console)
    found = dataclasses.replace(found, size=table.about.encoder["side"], see=True)
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
        sizes, modified = look(self.found.root, self.found.names)
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
            self.table.tidy()
        for some, are in (
            (found.absent, "are not there"),
            (found.untold, "cannot be reached now, what is known of them is kept"),
        ):
            if some:
                first = printable(self.found.names[some[0]])
                say(self.console, f"{len(some):,} listed files {are}, the first: {first}")
        unreadable = self.table.unreadable()
        for path, reason in unreadable[:_SHOWN]:
            say(self.console, f"Cannot be read: {path}: {reason}")
        if len(unreadable) > _SHOWN:
            say(self.console, f"… and {len(unreadable) - _SHOWN:,} more")
        done = Indexed(
            len(self.table) - len(unreadable),
            len(found.missing),
            len(found.changed),
            len(found.gone),
            len(unreadable),
        )
        say(
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
        kept = collection.hasher_of(self.table)
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
        with progress.bar(self.console, "Encoding photos", len(todo)) as bar:

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
                    self.table.tidy()

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
                if read.seen is not None:
                    squares.append(read.seen.square)
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
            if read.seen is None:
                known = (-1, -1) if read.may_pass else (read.size, read.modified_ns)
                rows.append(Row(name, *known, reason=read.reason))
            else:
                seen_as = (read.seen.width, read.seen.height, read.seen.thumbnail)
                rows.append(Row(name, read.size, read.modified_ns, next(codes).tobytes(), *seen_as))
        return rows, len(kept) - len(encoded)
