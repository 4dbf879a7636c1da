"""The context of a run: its config, folder, data and network, checked before anything expensive starts."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_collections
import numpy as np
import rich.console
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from cib_jax.augment import features
from cib_jax.augment.features import Standard
from cib_jax.config import build
from cib_jax.console import print_message, progress_bar
from cib_jax.data import cache, dataset, feature_files
from cib_jax.data.dataset import UNREADABLE, ImageSet, Source, gather, write_unreadable
from cib_jax.data.splits import Protocol, Splits
from cib_jax.distributed import multihost, sharding
from cib_jax.errors import DataError
from cib_jax.models import weights
from cib_jax.models.encoder import Encoder, Params
from cib_jax.training.loop import Schedule

Batches = Iterable[UInt8[np.ndarray, "batch height width 3"]]


@dataclasses.dataclass(frozen=True)
class Network:
    """A config's network, and images in the batches that it takes."""

    config: ml_collections.ConfigDict
    console: rich.console.Console
    encoder: Encoder
    initial: Params  # parameters to train, before the first step
    frozen: Params
    fingerprint: str  # fingerprint of the backbone weights that were loaded; "" if none were
    standard: Standard | None = None  # mean and deviation of the features, if the data are features

    def print(self, sentence: str) -> None:
        """Prints a sentence on the run's console."""
        print_message(self.console, sentence)

    @property
    def noun(self) -> str:
        """What the data are called in messages."""
        return "images" if self.standard is None else "items"

    @property
    def features_stay(self) -> bool:
        """Whether the backbone is a network that is not trained, so that features of images never change."""
        return bool(self.frozen) and self.initial.keys() == {"head"}

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The devices of this process that share work which needs no other process, such as encoding."""
        return sharding.local_mesh(0 if multihost.is_distributed() else self.config.devices)

    @functools.cached_property
    def joined(self) -> "list[Network]":
        """The frozen networks whose features this one joins, each by itself; [] if it joins none."""
        networks = []
        for name in self.encoder.backbone.networks:
            config = self.config.copy_and_resolve_references()
            with config.unlocked():
                config.backbone, config.image_size = name, self.encoder.image_size
            networks.append(Network(config, self.console, *build.encoder(config)))
        return networks

    def batches(self, images: ImageSet, start: int = 0, stop: int | None = None) -> Batches:
        """Returns images `start` to `stop` of a set, in order, in batches for encoding."""
        size = min(self.config.encode_batch, len(images))
        order = np.arange(len(images))[start:stop]
        return dataset.stream(images.images, order, size, stored_size=self.config.data.stored_size)

    def repeatable_batches(self, images: ImageSet) -> Callable[..., Batches]:
        """Returns a function (start, stop) → batches of these images, by default of all, that can be called repeatedly.

        A set that fits into `data.resident_mb` is decoded only once, at the first call.
        """
        stored_size = self.config.data.stored_size
        if dataset.size_in_bytes(images.images, stored_size=stored_size) > self.config.data.resident_mb * 2**20:
            return functools.partial(self.batches, images)
        size = self.config.encode_batch

        @functools.lru_cache(maxsize=1)
        def decoded(start: int, stop: int) -> UInt8[np.ndarray, "images height width 3"]:
            some = images.images if stop - start == len(images) else images.take(np.arange(start, stop)).images
            return dataset.materialize(some, stored_size=stored_size)

        def batches(start: int = 0, stop: int | None = None) -> Batches:
            stop = len(images) if stop is None else stop
            # Each of several processes decodes only the images that it is asked for.
            part = decoded(start, stop) if multihost.is_distributed() else decoded(0, len(images))[start:stop]
            return (part[at : at + size] for at in range(0, len(part), size))

        return batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext(Network):
    """Everything that is fixed for one run."""

    workdir: pathlib.Path
    protocol: Protocol
    source: Source
    splits: Splits
    is_teacher: bool = False  # whether this is the teacher of another run, which draws from random streams of its own

    @functools.cached_property
    def training_mesh(self) -> Mesh | None:
        """The devices, of all processes, that share each batch of training."""
        return sharding.make_mesh(self.config.devices, self.schedule.batch_size)

    @property
    def schedule(self) -> Schedule:
        """How long the run trains, and in which portions."""
        return build.schedule(self.config, len(self.splits.train))

    @functools.cached_property
    def data_digest(self) -> str:
        """A digest of the run's data: the sizes of its splits, their labels and names, and the mean of features."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.splits.train, self.splits.query, self.splits.database):
            digest.update(f"{len(part)} {part.labels is None}".encode())
            if part.labels is not None:
                digest.update(np.ascontiguousarray(part.labels).tobytes())
            if part.names is not None:
                digest.update(json.dumps(list(part.names)).encode())
        if self.standard is not None:
            digest.update(json.dumps(self.standard.to_lists()).encode())
        return digest.hexdigest()


def prepare_run(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    console: rich.console.Console,
    *,
    trained: bool = False,
    standard: Standard | None = None,
) -> RunContext:
    """Returns the context of a run: draws the splits, creates the encoder, and lists unreadable files.

    For a run that is `trained`, whose parameters will come from a checkpoint, `standard` is the one that it used.
    """
    protocol = build.protocol(config)
    # The folder of decoded and resized photos: in the cache, or in the workdir if there is no cache.
    photos = workdir / "photos"
    if config.cache.dir != "none":
        photos = (pathlib.Path(config.cache.dir).expanduser() if config.cache.dir else cache.home()) / "photos"

    @contextlib.contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        with progress_bar(console, what, total) as advance:
            yield lambda more: advance(more, "")

    source = build.source(config, photos, bar)
    cache.prune(photos, config.cache.mb * 2**20, cache.in_use)
    _report_source(config, source, workdir, console)
    splits = build.draw_splits(config, source)
    if config.backbone == "none" and not trained:
        standard = features.standard(blocks(splits.train))
    print_weights_download(config, console)
    network = build.encoder(config, trained=trained, standard=standard)
    data: dict[str, Any] = {"protocol": protocol, "source": source, "splits": splits}
    return RunContext(config, console, *network, standard, workdir=workdir, **data)


def print_weights_download(config: ml_collections.ConfigDict, console: rich.console.Console) -> None:
    """Prints the address if a backbone's weights must be downloaded, which takes minutes, or long to fail."""
    address = "" if config.backbone_weights else weights.download_url(config.backbone)
    if address:
        print_message(console, f"Downloading the weights of {config.backbone} from {address}, once")


def blocks(items: ImageSet) -> Iterator[Float[np.ndarray, "rows *views features"]]:
    """Yields features in blocks of rows, in order."""
    for start in range(0, len(items), feature_files.BLOCK):
        yield gather(items.images, np.arange(start, min(start + feature_files.BLOCK, len(items))))


def _report_source(
    config: ml_collections.ConfigDict, source: Source, workdir: pathlib.Path, console: rich.console.Console
) -> None:
    """Prints notes on the data, and lists files that cannot be read, up to `data.max_bad_fraction` of all."""
    for note in source.notes:
        print_message(console, note)
    path = workdir / UNREADABLE
    bad = source.unreadable
    write_unreadable(path, bad)
    if not bad:
        return
    everything = sum(map(len, source.roles.values())) if source.roles else len(source.train)
    everything += len(bad) + (len(source.test) if source.test else 0)
    summary = f"{len(bad):,} of {everything:,} images cannot be read; {path} lists them with the reasons"
    if len(bad) > config.data.max_bad_fraction * everything:
        raise DataError(
            f"config.data.dir: {summary} (the first: {bad[0]}), more than "
            f"config.data.max_bad_fraction={config.data.max_bad_fraction}; repair or remove them, or raise that limit",
            field="config.data.dir",
        )
    print_message(console, f"{summary}; the others are used")


def format_protocol(run: RunContext) -> str:
    """Returns the split, the depth of the ranking, and the published tables that compare with the run."""
    protocol = run.protocol
    split = protocol.says if run.source.roles is None else "the split of the list"
    if run.splits.database.labels is None:
        by = "by eye" if run.standard is None else "by the nearest items that they find"
        return f"Protocol {protocol.name}: {split}; without labels, codes are judged by their health and {by}"
    return f"Protocol {protocol.name}: {split}; MAP@{protocol.k or 'all'}; published tables: {protocol.tables()}"


def validate_same_data(run: RunContext) -> None:
    """Checks that all processes of a run have the same data and weights, whatever their folders are."""
    weights_used = run.fingerprint or "none"
    multihost.validate_alike({"config.data.dir": data_record(run), "config.backbone_weights": weights_used})


def data_record(run: RunContext) -> dict[str, Any]:
    """Returns the description of a run's data that its checkpoints hold."""
    return {"digest": run.data_digest, "train": len(run.splits.train), "database": len(run.splits.database)}


def describe_data_change(run: RunContext, extra: dict[str, Any]) -> str:
    """Returns a sentence on how the data differ from those of a checkpoint; "" if they are the same."""
    then, now = extra.get("data", {}), data_record(run)
    if then == now:
        return ""
    counts = [f"{data.get('train', 0):,} + {data.get('database', 0):,} {run.noun}" for data in (then, now)]
    return f"the data changed since the run began (training and database {counts[0]} then, {counts[1]} now)"
