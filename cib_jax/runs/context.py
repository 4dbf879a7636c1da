"""What the jobs of one run share: its config, folder, data and network, checked before anything heavy starts."""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
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
from cib_jax.data.dataset import Bar, ImageSet, Source, gather
from cib_jax.data.splits import Protocol, Splits
from cib_jax.distributed import multihost, sharding
from cib_jax.errors import DataError
from cib_jax.files import printable
from cib_jax.models import finetune, weights
from cib_jax.models.encoder import Encoder, Params
from cib_jax.runs.workdir import write_bytes

Batches = Iterable[UInt8[np.ndarray, "batch height width 3"]]


@dataclasses.dataclass(frozen=True)
class RunContext:
    """A run's surroundings; what changes in the run is passed beside it."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    console: rich.console.Console
    protocol: Protocol
    source: Source
    splits: Splits
    standard: Standard | None
    """Of the features, where the data are such."""
    encoder: Encoder
    initial: Params
    """The parameters to train, as they start."""
    frozen: Params
    fingerprint: str
    """Of the backbone weights that were loaded; "" if none were."""

    @property
    def features_stay(self) -> bool:
        """Whether features are those of a network of which nothing learns."""
        return bool(self.frozen) and not finetune.features_learn(self.initial)

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The devices of this process that compute side by side where no other process is needed."""
        return sharding.local_mesh(0 if multihost.is_distributed() else self.config.devices)

    def batches(self, images: ImageSet, start: int = 0, stop: int | None = None) -> Batches:
        """Returns images `start` to `stop` of a set, in order, in batches for encoding."""
        size = min(self.config.encode_batch, len(images))
        order = np.arange(len(images))[start:stop]
        return dataset.stream(images.images, order, size, stored_size=self.config.data.stored_size)

    def repeatable_batches(self, images: ImageSet) -> Callable[..., Batches]:
        """Returns a function that gives the set's batches, or those of images `start` to `stop`, again at each call.

        A set that fits into `data.resident_mb` is decoded only once, when it is first asked for.
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
            # Of several processes, each decodes what it is asked for and not what the others are.
            part = decoded(start, stop) if multihost.is_distributed() else decoded(0, len(images))[start:stop]
            return (part[at : at + size] for at in range(0, len(part), size))

        return batches

    @functools.cached_property
    def data_digest(self) -> str:
        """What a run's data are known by: how many images have which part in it, their labels, names and mean."""
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
    """Draws the splits and makes the encoder; `trained` says that its parameters will be those of a checkpoint.

    A run on features that was trained comes with the `standard` of its checkpoint (`restoring.read_standard`), since a
    trained head knows no other. Files that cannot be read are listed in unreadable.csv.

    Raises:
      ConfigError, DataError, WeightsError: something cannot be had or does not fit.
    """
    protocol = build.protocol(config)
    photos = _photos(config, workdir)
    source = build.source(config, photos, _bars(console))
    cache.prune(photos, config.cache.mb * 2**20, cache.in_use)
    _tell(config, source, workdir, console)
    splits = build.draw_splits(config, source)
    if config.backbone == "none" and not trained:
        standard = features.standard(_blocks(splits.train))
    print_weights_download(config, console)
    encoder, initial, frozen, fingerprint = build.encoder(config, trained=trained, standard=standard)
    return RunContext(
        config, workdir, console, protocol, source, splits, standard, encoder, initial, frozen, fingerprint
    )


def print_weights_download(config: ml_collections.ConfigDict, console: rich.console.Console) -> None:
    """Tells that a backbone's weights are fetched now, which takes minutes, or long to fail."""
    address = "" if config.backbone_weights else weights.download_url(config.backbone)
    if address:
        print_message(console, f"Fetching the weights of {config.backbone} from {address}, once")


def _blocks(items: ImageSet) -> Iterator[Float[np.ndarray, "rows *views features"]]:
    for start in range(0, len(items), feature_files.BLOCK):
        yield gather(items.images, np.arange(start, min(start + feature_files.BLOCK, len(items))))


def _photos(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Returns where photos are kept, decoded and resized: with the features, or with the run if nothing is kept."""
    if config.cache.dir == "none":
        return workdir / "photos"
    return (pathlib.Path(config.cache.dir).expanduser() if config.cache.dir else cache.home()) / "photos"


def _bars(console: rich.console.Console) -> Bar:
    @contextlib.contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        with progress_bar(console, what, total) as moved:
            yield lambda more: moved(more, "")

    return bar


def _tell(
    config: ml_collections.ConfigDict, source: Source, workdir: pathlib.Path, console: rich.console.Console
) -> None:
    """Tells how the data were read and lists what could not be.

    Raises:
      DataError: more than `data.max_bad_fraction` could not be.
    """
    for note in source.notes:
        print_message(console, note)
    path = workdir / "unreadable.csv"
    bad = source.unreadable
    if not bad:
        path.unlink(missing_ok=True)
        return
    rows = io.StringIO()
    csv.writer(rows).writerows([("path", "reason"), *((file.path, file.reason) for file in bad)])
    # Paths that are no valid text keep their bytes.
    write_bytes(path, rows.getvalue().encode("utf-8", "surrogateescape"))
    everything = sum(map(len, source.roles.values())) if source.roles else len(source.train)
    everything += len(bad) + (len(source.test) if source.test else 0)
    told = f"{len(bad):,} of {everything:,} images cannot be read; {path} lists them with the reasons"
    if len(bad) > config.data.max_bad_fraction * everything:
        shown = printable(bad[0].path)
        raise DataError(
            f"config.data.dir: {told} (the first: {shown}: {bad[0].reason}), more than config.data.max_bad_fraction="
            f"{config.data.max_bad_fraction}; mend or remove them, or raise that limit"
        )
    print_message(console, f"{told}; the others are used")


def validate_same_data(setting: RunContext) -> None:
    """Checks that all processes of a run found the same data and weights, wherever these lie on each machine.

    Raises:
      SharedRefusal: one found others.
    """
    multihost.validate_alike(
        {"config.data.dir": data_record(setting), "config.backbone_weights": setting.fingerprint or "none"}
    )


def data_record(setting: RunContext) -> dict[str, Any]:
    """Returns what a checkpoint keeps of the data that it was made on."""
    counts = {"train": len(setting.splits.train), "database": len(setting.splits.database)}
    return {"digest": setting.data_digest, **counts}


def describe_data_change(setting: RunContext, extra: dict[str, Any]) -> str:
    """Returns, in words, how the data differ from those that a checkpoint was made on; "" where they do not."""
    then, now = extra.get("data", {}), data_record(setting)
    if then == now:
        return ""
    counts = [f"{data.get('train', 0):,} + {data.get('database', 0):,} images" for data in (then, now)]
    return f"the data changed since the run began (training and database {counts[0]} then, {counts[1]} now)"
