"""Indexing of photos for searching: finds files that are new, changed or gone, and encodes only those."""

import contextlib
import dataclasses
import errno
import importlib
import itertools
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
from jaxtyping import Bool, Int64, UInt8

from cib_jax import fitting
from cib_jax.baselines import linear
from cib_jax.config import build, flatten, schema
from cib_jax.console import on_stdout, print_message, progress_bar
from cib_jax.data import inputs
from cib_jax.data.dataset import UNREADABLE, ImageSet, Unreadable, write_unreadable
from cib_jax.data.inputs import Photos, Read
from cib_jax.data.photo_folder import parse_patterns
from cib_jax.data.photos import truncated_note
from cib_jax.distributed import sharding
from cib_jax.errors import ConfigError, DataError, ExportedError, IndexFolderError
from cib_jax.files import count, first_line, locked, map_in_order, modified_ns, short_reason
from cib_jax.hint import HINT
from cib_jax.inference.hasher import Hasher
from cib_jax.losses import is_taught
from cib_jax.models import registry
from cib_jax.models.encoder import plain_features
from cib_jax.random_streams import stream_rng
from cib_jax.runs import context, features
from cib_jax.storage import collection, photo_table, search_copy
from cib_jax.storage.photo_table import AT_ONCE, IndexMetadata, PhotoTable, Row, State, key_of
from cib_jax.training import grad_cache
from cib_jax.training.trainer import TrainingData

BLOCK = 512  # files in a commit, about, and so the most that a killed process loses
TIDY_EVERY = 256  # commits after which small fragments are merged
LISTED = 5  # unreadable files that are listed in the output
GROWN = 4  # times as many photos as an encoder was trained on, from which a message proposes another
CHANGEABLE = ("encode_batch", "data.max_megapixels", "data.truncated", "devices", "backbone_weights")
"""Fields that may be set although the encoder is already trained."""


class Indexed(NamedTuple):
    """Photos that can be searched now, files that this call added, changed and removed, and unreadable files."""

    photos: int
    added: int
    changed: int
    removed: int
    unreadable: int


def index(
    index: pathlib.Path | str,
    images: pathlib.Path | str | None = None,
    *,
    workdir: pathlib.Path | str | None = None,
    relearn: bool = False,
    exclude: Sequence[str] | None = None,
    config: ml_collections.ConfigDict | None = None,
    overrides: dict[str, Any] | None = None,
    console: rich.console.Console | None = None,
) -> Indexed:
    """Updates an index to the current photos, and makes it if there is none.

    Each block of photos is one commit. Killed at any moment, the same call goes on; several processes that index the
    same photos at once share the work.

    Args:
      index: Folder of the index, or another address that LanceDB accepts.
      images: Folder of photos, or a .csv or .parquet list of them; None: the photos of the index.
      workdir: Folder of a trained run, or of a saved hasher; None: the index's own encoder, which for a new index is
        trained on the photos.
      relearn: Whether an existing index gets another encoder, trained on the present photos or that of `workdir`. It is
        made anew beside the old one, and replaces it when it is complete.
      exclude: Shell patterns of files and folders that are left out: of their names, as "*.png", or with a slash of
        their paths in the folder, as "2020/*". None: those of the index, with which it was last updated.
      config: Config of the experiment that trains the encoder; None: `configs/index.py`.
      overrides: Fields of `config` that were set by the user, by dotted name.
      console: Console for messages.

    Raises:
      IndexFolderError: LanceDB is not installed, or the index cannot be read or written, or belongs to another encoder
        or to other photos.
      DataError: There are no photos, or they cannot be read.
      ConfigError: A field cannot be set.
      CheckpointError, SavedHasherError, WeightsError: There is no encoder in `workdir`.

    Examples:
      >>> import rich.console
      >>> import cib_jax as cib
      >>> quiet = rich.console.Console(quiet=True)
      >>> cib.index_photos("INDEX_2", "PHOTOS", workdir="RUN", console=quiet)
      Indexed(photos=3, added=3, changed=0, removed=0, unreadable=0)
    """
    uri, overrides, console = photo_table.normalize_uri(index), overrides or {}, on_stdout(console)
    config = config or importlib.import_module("cib_jax.configs.index").get_config()
    photo_table.validate_installed()
    if relearn:
        return _relearn(uri, images, workdir, exclude, config, overrides, console)
    schema.validate(config)
    given = _load_encoder(workdir, config, overrides) if workdir is not None else None
    table = PhotoTable.open(uri) if PhotoTable.exists(uri) else None
    if table is None and images is None:
        problem = f"--images is missing, and there is no index at {uri} yet; give the folder of photos"
        raise IndexFolderError(problem, field="--images")
    if table is not None and given is not None:
        _validate_same_encoder(table, given, workdir)
    if exclude is None:
        exclude = table.metadata.exclude if table is not None else ()
    exclude = parse_patterns(exclude)
    place = str(images) if images is not None else table.metadata.images if table is not None else ""
    print_message(console, f"Looking through {place}")
    # Read before the files are listed: what another process indexes meanwhile is not gone.
    before = table.state().keys if table is not None else np.zeros(0, np.int64)
    limit = config.data.max_megapixels
    found = inputs.load_inputs(place, takes="images", size=1, max_megapixels=limit, exclude=exclude)
    assert isinstance(found, Photos)
    found = dataclasses.replace(found, truncated=[] if config.data.truncated else None)
    for note in found.notes:
        print_message(console, note)
    own = f"the encoder of {uri}"
    known: dict[str, Read] = {}  # photos that training has decoded
    if table is None:
        made = given or train_index_encoder(found, config, console, known)
        learnt, photos = ({}, 0) if given else (flatten(config), len(found.names))
        metadata = IndexMetadata(found.place, collection.encoder_identity(made), learnt, photos, tuple(exclude))
        table = PhotoTable.create(uri, metadata, collection.hasher_bytes(made))
        if table.metadata.encoder != metadata.encoder:  # another process was faster
            if given:
                _validate_same_encoder(table, given, workdir)
            _validate_overrides(overrides, own, table.metadata.learnt)
            print_message(console, "Another process made the index meanwhile; its encoder is used")
    elif given is None:
        _validate_overrides(overrides, own, table.metadata.learnt)
    _validate_images(table, found, before, console)
    table.record(images=found.place, exclude=exclude)
    side = table.metadata.encoder["side"]
    known = {name: read for name, read in known.items() if read.content is not None and len(read.content) == side}
    files = _stat_files(dataclasses.replace(found, size=side, thumbnails=True, known=known))
    changes = _find_changes(table, files, before)
    for start in range(0, len(changes.gone), AT_ONCE):
        table.remove(changes.gone[start : start + AT_ONCE])
    hasher = None
    if pending := sorted([*changes.missing, *changes.changed, *changes.retried]):
        hasher = collection.load_hasher(table)  # because another process may have made the index
        hasher = dataclasses.replace(hasher, batch_size=config.encode_batch, devices=config.devices)
        _encode_files(table, files, pending, hasher, console)
        table.compact()
    if photo_table.is_local(uri):
        _copy_for_search(table, hasher, console)
    if found.truncated:
        print_message(console, truncated_note(found.truncated))
    return _summarize(table, str(index), files, changes, console)


def _relearn(
    uri: str,
    images: pathlib.Path | str | None,
    workdir: pathlib.Path | str | None,
    exclude: Sequence[str] | None,
    config: ml_collections.ConfigDict,
    overrides: dict[str, Any],
    console: rich.console.Console,
) -> Indexed:
    """Makes an index with another encoder beside the present one, and then puts it in its place."""
    if not photo_table.is_local(uri):
        problem = f"must be a folder for --relearn, got {uri}; index the photos into another place instead"
        raise IndexFolderError(f"--index {problem}", field="--index")
    new, old = f"{uri}.new", f"{uri}.old"
    if os.path.isdir(old) and not os.path.exists(uri):
        os.rename(old, uri)  # an earlier call was interrupted between the two below
    metadata, config = PhotoTable.open(uri).metadata, config.copy_and_resolve_references()
    fields = flatten(config).keys() - overrides.keys() - {"encode_batch", "devices"}
    try:
        config.update_from_flattened_dict({field: metadata.learnt[field] for field in fields & metadata.learnt.keys()})
    except (TypeError, ValueError, AttributeError) as error:
        problem = f"the fields by which {uri} was learned are damaged ({first_line(error)}); index into another folder"
        raise IndexFolderError(f"--index: {problem}", field="--index") from error
    if exclude is None:
        exclude = metadata.exclude
    if images is not None:
        _validate_place(uri, metadata.images, os.path.abspath(os.path.expanduser(images)))
    if workdir is None and PhotoTable.exists(new):
        begun, ignored = PhotoTable.open(new).metadata.learnt, schema.MAY_CHANGE.union(CHANGEABLE)
        if not begun or (changed := schema.differences(flatten(config), begun, ignored)):
            what = f"other fields ({changed[0]})" if begun else "an encoder of --workdir"
            problem = f"{new} was begun with {what}; give the command that began it, or remove that folder"
            raise IndexFolderError(f"--relearn: {problem}", field="--relearn")
    options: dict[str, Any] = {"workdir": workdir, "exclude": exclude, "config": config, "overrides": overrides}
    done = index(new, images or metadata.images, console=console, **options)
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # file systems without locks, too
                stack.enter_context(locked(pathlib.Path(new, "exchange.lock")))
            if not os.path.isdir(new):
                return done  # another process has put it in its place meanwhile
            shutil.rmtree(old, ignore_errors=True)
            os.rename(uri, old)
            os.rename(new, uri)
    except OSError as error:
        problem = f"{new} cannot take the place of {uri} ({short_reason(error)})"
        raise IndexFolderError(f"--index: {problem}; give the same command again", field="--index") from error
    shutil.rmtree(old, ignore_errors=True)
    print_message(console, f"{new} has replaced {uri}")
    return done


def _print_unreadable(table: PhotoTable, files: list[Unreadable], console: rich.console.Console) -> None:
    """Prints the first files that cannot be read, with the reasons, and lists all in the folder of the index.

    Without such a folder, all are printed.
    """
    shown, path = len(files), pathlib.Path(table.uri) / UNREADABLE
    if photo_table.is_local(table.uri):
        try:
            write_unreadable(path, files)
            shown = LISTED
        except OSError as error:
            print_message(console, f"{path} cannot be written: {short_reason(error)}")
    for file in files[:shown]:
        print_message(console, f"Cannot be read: {file}")
    if len(files) > shown:
        print_message(console, f"… and {len(files) - shown:,} more, all listed in {path}")


def _copy_for_search(table: PhotoTable, hasher: Hasher | None, console: rich.console.Console) -> None:
    """Writes the copy that makes a search for one photo start sooner, unless it is there already."""
    if not search_copy.is_current(table):
        try:
            search_copy.write(table, hasher or collection.load_hasher(table))
        except (OSError, ExportedError) as error:
            print_message(console, f"A search will take seconds longer to start: {first_line(error)}")


def _summarize(
    table: PhotoTable, name: str, files: "_Files", changes: "_Changes", console: rich.console.Console
) -> Indexed:
    unreadable = table.unreadable()
    others = list(files.found.closed)
    kept = "cannot be reached now; its entry is kept"
    for some, state in ((changes.absent, "not there"), (changes.unreachable, kept)):
        others += [Unreadable(files.found.names[place], state) for place in some]
    _print_unreadable(table, sorted([*unreadable, *others]), console)
    done = Indexed(
        len(table) - len(unreadable), len(changes.missing), len(changes.changed), len(changes.gone), len(unreadable)
    )
    print_message(
        console,
        f"{count(done.photos, 'photo')} in {name}: {count(done.added, 'file')} new, {done.changed:,} changed, "
        f"{done.removed:,} gone, {done.unreadable:,} unreadable",
    )
    before, wanted = table.metadata.photos, table.metadata.learnt.get("data.train_images", 0)
    if before and done.photos >= max(GROWN * before, FEWEST) and (before < wanted or wanted <= 0):
        print_message(
            console,
            f"The encoder was learned from an index of {count(before, 'photo')}; --relearn would give better codes",
        )
    return done


# Agreement with an existing index


def _load_encoder(workdir: pathlib.Path | str, config: ml_collections.ConfigDict, overrides: dict[str, Any]) -> Hasher:
    """Returns the encoder in `workdir`."""
    workdir = pathlib.Path(workdir).expanduser()
    _validate_overrides(overrides, f"the encoder in {workdir}")
    # A hasher that was saved without its run contains all weights.
    hasher = Hasher.load(workdir, backbone_weights=config.backbone_weights)
    if hasher.encoder.backbone.takes != "images":
        raise IndexFolderError(
            f"--workdir must be a run on images, because an index holds photos, got {workdir}, trained on features; "
            "give another run, or search features by cib_jax.Index",
            field="--workdir",
        )
    return hasher


def _validate_overrides(overrides: dict[str, Any], encoder: str, trained_by: dict[str, Any] | None = None) -> None:
    """Refuses fields that would change a trained encoder; values that it was trained by may be given again."""
    for name, value in overrides.items():
        if name in CHANGEABLE or (trained_by and trained_by.get(name, value) == value):
            continue
        problem = f"must be left out, because {encoder} is already trained; try {', '.join(CHANGEABLE)}"
        if trained_by:
            problem = f"must be {trained_by[name]!r}, with which {encoder} was trained, got {value!r}; leave it out, "
            problem += "add --relearn to train another, or give another --index"
        raise ConfigError(f"config.{name} {problem}", field=f"config.{name}")


def _validate_same_encoder(table: PhotoTable, hasher: Hasher, workdir: pathlib.Path | str | None) -> None:
    """Refuses an encoder that makes codes not comparable with those of the index."""
    ours, theirs = collection.encoder_identity(hasher), table.metadata.encoder
    other = [f"{name}: {theirs.get(name)} → {value}" for name, value in ours.items() if theirs.get(name) != value]
    if other:
        raise IndexFolderError(
            f"--workdir must hold the encoder that made {table.uri}, got another one in {workdir} "
            f"({'; '.join(other)}); leave it out to use the index's own, or give another --index",
            field="--workdir",
        )


def _validate_images(
    table: PhotoTable, found: Photos, known: Int64[np.ndarray, " known"], console: rich.console.Console
) -> None:
    """Refuses other photos than those of the index, unless these were moved."""
    before = table.metadata.images
    if before == found.place:
        return
    _validate_place(table.uri, before, found.place)
    # The disk of the old photos may just be unmounted: if they were regarded as moved, all entries would be lost.
    if len(known) and not np.isin(known, [key_of(name) for name in found.names]).any():
        raise IndexFolderError(
            f"--images must hold the photos of {table.uri}, which were in {before}, but none of them is in "
            f"{found.place}; give their new place, or another --index",
            field="--images",
        )
    print_message(console, f"The photos of {before} are now expected in {found.place}, under the same names")


def _validate_place(uri: str, before: str, place: str) -> None:
    """Refuses another place than that of an index's photos, as long as that exists."""
    if before != place and os.path.exists(before):
        raise IndexFolderError(
            f"--images must be {before}, the photos of {uri}, got {place}; leave it out, or give another --index for "
            f"{place}",
            field="--images",
        )


# Changes of files

ABSENT, UNREACHABLE = -1, -2
"""Stand in for a file's size: it is not there; or it is unknown whether it is, as in a folder without permission."""

_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


class _Files(NamedTuple):
    """The files to be indexed, as they were found."""

    found: Photos
    keys: Int64[np.ndarray, " files"]
    sizes: Int64[np.ndarray, " files"]  # in bytes; or `ABSENT` or `UNREACHABLE`
    modified: Int64[np.ndarray, " files"]  # times of the last change, in nanoseconds since 1970

    def compare(self, state: State) -> tuple[Bool[np.ndarray, " files"], Bool[np.ndarray, " files"]]:
        """Returns which files are in the index, and which of them are unchanged."""
        if not len(state.keys):
            return (np.zeros(len(self.keys), bool),) * 2
        places = np.minimum(np.searchsorted(state.keys, self.keys), len(state.keys) - 1)
        known = state.keys[places] == self.keys
        return known, known & (state.sizes[places] == self.sizes) & (state.modified_ns[places] == self.modified)


class _Changes(NamedTuple):
    """Numbers of the files that differ from the index."""

    missing: list[int]
    changed: list[int]
    retried: list[int]  # could not be read, for a reason that may be gone
    gone: list[int]  # keys, not numbers, of files that exist no longer
    absent: list[int]  # listed, but do not exist
    unreachable: list[int]  # listed, and may or may not exist; their entries are kept


def _stat_files(found: Photos) -> _Files:
    keys = np.array([key_of(name) for name in found.names], np.int64)
    if len(np.unique(keys)) != len(keys):
        raise DataError(
            f"--images must list each file once, got a path twice, or two paths with the same key, in {found.place}",
            field="--images",
        )

    def stat_some(start: int) -> list[tuple[int, int]]:
        return [_stat(os.path.join(found.root, name)) for name in found.names[start : start + 1000]]

    pairs = [pair for _, some in map_in_order(stat_some, range(0, len(keys), 1000)) for pair in some]
    sizes, modified = np.array(pairs, np.int64).reshape(-1, 2).T
    if not (sizes >= 0).any():
        raise DataError(
            f"--images: none of the photos of {found.place} exists; mount their disk again, and the same command goes "
            "on",
            field="--images",
        )
    return _Files(found, keys, sizes, modified)


def _stat(path: str) -> tuple[int, int]:
    """Returns the size of a file and the time of its last change."""
    try:
        status = os.stat(path)
    except OSError as error:
        return (ABSENT, ABSENT) if error.errno in _NOT_THERE else (UNREACHABLE, UNREACHABLE)
    except ValueError:  # a list may contain a name that is impossible for a file
        return ABSENT, ABSENT
    return status.st_size, modified_ns(status)


def _find_changes(table: PhotoTable, files: _Files, before: Int64[np.ndarray, " known"]) -> _Changes:
    """Returns what to change so that a table agrees with the files.

    `before` holds the keys that the index held before the files were listed: a file that another process has indexed
    since may also have appeared since, so it is not gone because it is not listed.
    """
    state = table.state()
    known, same = files.compare(state)
    exists = files.sizes >= 0
    listed = np.isin(before, files.keys[files.sizes != ABSENT])
    gone = before[~listed & np.isin(before, state.keys)].tolist()
    if files.found.closed:
        # The content of a folder that cannot be entered now may be accessible tomorrow.
        closed = tuple(f"{folder.path}/" for folder in files.found.closed)
        gone = [key_of(path) for path in table.paths(gone) if not path.startswith(closed)]
    retried = np.isin(files.keys, state.keys[state.sizes < 0])
    masks = {
        "missing": exists & ~known,
        "changed": exists & known & ~same & ~retried,
        "retried": exists & retried,
        "absent": files.sizes == ABSENT,
        "unreachable": files.sizes == UNREACHABLE,
    }
    return _Changes(gone=gone, **{name: np.flatnonzero(mask).tolist() for name, mask in masks.items()})


# Encoding


def _encode_files(
    table: PhotoTable, files: _Files, pending: list[int], hasher: Hasher, console: rich.console.Console
) -> None:
    """Encodes and commits files, except for those that another process has committed meanwhile."""
    # Blocks consist of whole batches, since an incomplete batch takes as long as a whole one.
    size = max(1, BLOCK // hasher.batch_size) * hasher.batch_size
    blocks = [pending[start : start + size] for start in range(0, len(pending), size)]
    # Each process starts at another block, so that they rarely work on the same one.
    first = secrets.randbelow(len(blocks))
    blocks = blocks[first:] + blocks[:first]
    version = table.version
    with progress_bar(console, "Encoding photos", len(pending)) as advance:

        def due() -> Iterator[list[int]]:
            nonlocal version
            for block in blocks:
                left = block
                if table.version != version:
                    version = table.version
                    _, same = files.compare(table.state())
                    left = [number for number in block if not same[number]]
                    advance(len(block) - len(left))
                yield left

        # One stream over all blocks, so that decoding one block overlaps with encoding the one before.
        block_of = {number: at for at, block in enumerate(blocks) for number in block}
        stream = files.found.read(due())
        for commits, (_, reads) in enumerate(itertools.groupby(stream, key=lambda pair: block_of[pair[0]]), 1):
            rows, unread = _encode_block(files.found, reads, hasher, advance)
            table.put(rows)
            # If the version grew by more than this commit, another process has committed files, too.
            version += table.version == version + 1
            if unread:
                advance(unread)
            if commits % TIDY_EVERY == 0:
                table.compact()


def _encode_block(
    found: Photos, reads: Iterator[tuple[int, Read]], hasher: Hasher, advance: Callable[[int], None]
) -> tuple[list[Row], int]:
    """Returns the rows of a block, and how many of its files have no code; encodes while it reads."""
    kept: list[tuple[int, Read]] = []

    def squares() -> Iterator[UInt8[np.ndarray, "side side 3"]]:
        for number, read in reads:
            kept.append((number, read._replace(content=None)))
            if read.decoded is not None:
                yield read.decoded.square

    readable = squares()
    batches = iter(lambda: list(itertools.islice(readable, hasher.batch_size)), [])
    # All batches have one size, so that a code does not depend on how the files are cut into blocks.
    encoded, features = hasher.encode_with_features(map(np.stack, batches), advance, size=hasher.batch_size)
    codes, rows = zip(encoded, features, strict=True), []
    for number, read in kept:
        name = found.names[number]
        if read.size is None or read.modified_ns is None:
            continue  # the file has vanished meanwhile, and the next call will find it gone
        if read.decoded is None:
            state = (-1, -1) if read.transient else (read.size, read.modified_ns)
            rows.append(Row(name, *state, reason=read.reason))
        else:
            photo = (read.decoded.width, read.decoded.height, read.decoded.thumbnail)
            code, feature = next(codes)
            rows.append(Row(name, read.size, read.modified_ns, code.tobytes(), *photo, feature=feature.tobytes()))
    return rows, len(kept) - len(encoded)


# Training of an encoder on the photos


FEWEST = 16  # photos to train on; fewer get an encoder that is not trained
FEW = 500  # photos below which a message says that they are few


def train_index_encoder(
    found: Photos, config: ml_collections.ConfigDict, console: rich.console.Console, known: dict[str, Read]
) -> Hasher:
    """Returns an encoder that was trained, without labels, on a random sample of `data.train_images` photos.

    The photos of the sample are put into `known`, by name. From fewer than `FEWEST`, contrast learns nothing: the
    encoder is then that of `_project`.
    """
    if config.backbone == "none":
        raise ConfigError("config.backbone must be a network for photos, got 'none'", field="config.backbone")
    context.print_weights_download(config, console)
    encoder, params, frozen, fingerprint = build.encoder(config)
    images = _sample(found, config, console, known)
    if not len(images):
        problem = f"must hold a photo that can be read, got none of {len(found.names)} in {found.place}; add some"
        raise DataError(f"--images {problem}", field="--images")
    if len(images) < FEWEST:
        codes = f"{config.bits}-bit codes by random projections of the backbone's features"
        remedy = f"--relearn, once there are {FEWEST} or more, or --workdir=RUN of a trained run, gives better codes"
        print_message(console, f"{count(len(images), 'photo')} cannot train an encoder: {codes}; {remedy}")
        return _project(images, config)
    message = f"No --workdir of a trained run: training {config.bits}-bit codes on {len(images):,} of the photos"
    if len(images) < FEW:
        message += ", which are few: more photos, or --workdir=RUN of a trained run, give better codes"
    print_message(console, message)
    devices = sharding.mesh_size(sharding.local_mesh(config.devices))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.batch_size = build.schedule(config, len(images)).batch_size
        config.batch_size, config.micro_batch = batch_for(len(images), devices, config)
    mesh = sharding.make_mesh(config.devices, config.batch_size)
    grad_cache.validate_micro_batch(config.micro_batch, config.batch_size // sharding.mesh_size(mesh))
    views = config.train.views if config.frozen else 0
    if views:  # whose features are kept: interrupted, the same call goes on after the last view
        network = context.Network(config, console, encoder, params, frozen, fingerprint)
        bank = features.of_views(network, ImageSet(images, None), views, "Training: views")
        data = TrainingData(images, bank)
    else:
        data = TrainingData(jnp.asarray(images))
    run = build.training_run(config, (encoder, params, frozen), data, mesh)
    teacher_run = None
    if is_taught(config.objective):
        theirs = build.teacher_config(config, len(images))
        made = build.encoder(theirs, stream="teacher weights")[:3]
        teacher_run = build.training_run(theirs, made, data, mesh, stream="teacher steps")
    # A bar of its own: its images per second are not those of the views.
    total = run.images_seen + (teacher_run.images_seen if teacher_run else 0)
    with progress_bar(console, "Training: codes", total) as advance:
        hasher = fitting.train_hasher(
            run, images, config.devices, lambda report: None, advance, build.teacher(config), teacher_run
        )
    return dataclasses.replace(hasher, stored_size=images.shape[1], batch_size=config.encode_batch)


def _project(images: UInt8[np.ndarray, "images side side 3"], config: ml_collections.ConfigDict) -> Hasher:
    """Returns an encoder whose bits are the sides of random hyperplanes (LSH) on which the backbone's features are."""
    config = config.copy_and_resolve_references()
    config.hidden = 2 * config.bits
    HINT.show("Computing features of the photos")
    encoder, params, frozen, _ = build.encoder(config)
    features = np.asarray(plain_features(encoder, params, frozen, images))
    # The row of zeros draws the planes away from the mean of the photos, which is the photo itself if there is one.
    rows = np.vstack([features, np.zeros_like(features[:1])])
    planes = linear.lsh(rows, config.bits, build.key(config, "initial weights"))
    kernel, eye = np.asarray(planes.directions), np.eye(config.bits, dtype=np.float32)
    bias = -np.asarray(planes.mean) @ kernel
    # max(x, 0) − max(−x, 0) = x: the two layers of a hash head compute one linear map.
    hidden = {"kernel": np.hstack([kernel, -kernel]), "bias": np.hstack([bias, -bias])}
    head = {"hidden": hidden, "out": {"kernel": np.vstack([eye, -eye]), "bias": np.zeros_like(bias)}}
    head = jax.tree.map(jnp.asarray, head)
    return Hasher(encoder, params | {"head": head}, frozen, config.encode_batch, images.shape[1], config.devices)


def batch_for(count: int, devices: int, config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Returns batch size and micro-batch: those of the config, or smaller ones that `count` photos allow."""
    if config.batch_size <= count:
        return config.batch_size, config.micro_batch
    # Whole parts on each device; all images at once if there are fewer than one part.
    part = config.micro_batch if devices * config.micro_batch <= count else 0
    unit = devices * max(part, 1)
    size = count // unit * unit
    if not size:
        problem = f"must have at least as many readable photos as devices share a batch, {devices}, got {count}"
        raise DataError(f"--images {problem}; set --config.devices=1, or give more photos", field="--images")
    return size, part


def _sample(
    found: Photos, config: ml_collections.ConfigDict, console: rich.console.Console, known: dict[str, Read]
) -> UInt8[np.ndarray, "images side side 3"]:
    """Returns random readable photos, as many as `data.train_images` says, in random order; puts them into `known`."""
    side = config.data.stored_size or config.image_size or registry.get(config.backbone).image_size
    wanted = min(config.data.train_images if config.data.train_images > 0 else len(found.names), len(found.names))
    order = stream_rng(config.data.seed, "index sample").permutation(len(found.names)).tolist()
    images = np.empty((wanted, side, side, 3), np.uint8)
    count = 0
    with progress_bar(console, "Reading some photos", wanted) as advance:
        # Numbers are drawn lazily, so that reading ends when there are enough readable photos.
        numbers = itertools.takewhile(lambda number: count < wanted, order)
        for number, read in dataclasses.replace(found, size=side, thumbnails=True).read([numbers]):
            if read.decoded is None:
                continue
            known[found.names[number]] = read
            if count < wanted:
                square = images[count]  # of which there is no other copy in memory
                square[:] = read.decoded.square
                kept = read._replace(content=square, decoded=read.decoded._replace(square=square))
                known[found.names[number]] = kept
                count += 1
                advance(1, "")
    return images[:count]
