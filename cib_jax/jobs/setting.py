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

from cib_jax.backbones import fine_tuning, sources
from cib_jax.config import from_config
from cib_jax.data import holding, loader, vectors
from cib_jax.data.images import Bar, DataError, ImageSet, Source, gather
from cib_jax.data.names import printable
from cib_jax.data.protocols import Protocol
from cib_jax.data.splits import Splits
from cib_jax.devices import parallel, processes
from cib_jax.encoder import Encoder, Params
from cib_jax.jobs import feature_cache, progress
from cib_jax.jobs import workdir as workdir_lib
from cib_jax.jobs.presenting import say
from cib_jax.views import feature_views
from cib_jax.views.feature_views import Standard

Batches = Iterable[UInt8[np.ndarray, "batch height width 3"]]


@dataclasses.dataclass(frozen=True)
class Setting:
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
        return bool(self.frozen) and not fine_tuning.features_learn(self.initial)

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The devices of this process that compute side by side where no other process is needed."""
        return parallel.local_mesh(0 if processes.several() else self.config.devices)

    def batches(self, images: ImageSet, start: int = 0, stop: int | None = None) -> Batches:
        """Returns images `start` to `stop` of a set, in order, in batches for encoding."""
        size = min(self.config.encode_batch, len(images))
        order = np.arange(len(images))[start:stop]
        return loader.stream(images.images, order, size, stored_size=self.config.data.stored_size)

    def repeatable_batches(self, images: ImageSet) -> Callable[..., Batches]:
        """Returns a function that gives the set's batches, or those of images `start` to `stop`, again at each call.

        A set that fits into `data.resident_mb` is decoded only once, when it is first asked for.
        """
        stored_size = self.config.data.stored_size
        if loader.size_in_bytes(images.images, stored_size=stored_size) > self.config.data.resident_mb * 2**20:
            return functools.partial(self.batches, images)
        size = self.config.encode_batch

        @functools.lru_cache(maxsize=1)
        def decoded(start: int, stop: int) -> UInt8[np.ndarray, "images height width 3"]:
            some = images.images if stop - start == len(images) else images.take(np.arange(start, stop)).images
            return loader.materialise(some, stored_size=stored_size)

        def batches(start: int = 0, stop: int | None = None) -> Batches:
            stop = len(images) if stop is None else stop
            # Of several processes, each decodes what it is asked for and not what the others are.
            part = decoded(start, stop) if processes.several() else decoded(0, len(images))[start:stop]
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


def prepare(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    console: rich.console.Console,
    *,
    trained: bool = False,
    standard: Standard | None = None,
) -> Setting:
    """Draws the splits and makes the encoder; `trained` says that its parameters will be those of a checkpoint.

    A run on features that was trained comes with the `standard` of its checkpoint (`restoring.read_standard`), since a
    trained head knows no other. Files that cannot be read are listed in unreadable.csv.

    Raises:
      ConfigError, DataError, WeightsError: something cannot be had or does not fit.
    """
    protocol = from_config.protocol(config)
    photos = _photos(config, workdir)
    source = from_config.source(config, photos, _bars(console))
    feature_cache.prune(photos, config.cache.mb * 2**20, holding.in_use)
    _tell(config, source, workdir, console)
    splits = from_config.draw_splits(config, source)
    if config.backbone == "none" and not trained:
        standard = feature_views.standard(_blocks(splits.train))
    tell_of_fetching(config, console)
    encoder, initial, frozen, fingerprint = from_config.encoder(config, trained=trained, standard=standard)
    return Setting(config, workdir, console, protocol, source, splits, standard, encoder, initial, frozen, fingerprint)


def tell_of_fetching(config: ml_collections.ConfigDict, console: rich.console.Console) -> None:
    """Tells that a backbone's weights are fetched now, which takes minutes, or long to fail."""
    address = "" if config.backbone_weights else sources.to_fetch(config.backbone)
    if address:
        say(console, f"Fetching the weights of {config.backbone} from {address}, once")


def _blocks(items: ImageSet) -> Iterator[Float[np.ndarray, "rows *views features"]]:
    for start in range(0, len(items), vectors.BLOCK):
        yield gather(items.images, np.arange(start, min(start + vectors.BLOCK, len(items))))


def _photos(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Returns where photos are kept, decoded and resized: with the features, or with the run if nothing is kept."""
    if config.cache.dir == "none":
        return workdir / "photos"
    return (pathlib.Path(config.cache.dir).expanduser() if config.cache.dir else feature_cache.home()) / "photos"


def _bars(console: rich.console.Console) -> Bar:
    @contextlib.contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        with progress.bar(console, what, total) as moved:
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
        say(console, note)
    path = workdir / "unreadable.csv"
    bad = source.unreadable
    if not bad:
        path.unlink(missing_ok=True)
        return
    rows = io.StringIO()
    csv.writer(rows).writerows([("path", "reason"), *((file.path, file.reason) for file in bad)])
    # Paths that are no valid text keep their bytes.
    workdir_lib.write_bytes(path, rows.getvalue().encode("utf-8", "surrogateescape"))
    everything = sum(map(len, source.roles.values())) if source.roles else len(source.train)
    everything += len(bad) + (len(source.test) if source.test else 0)
    told = f"{len(bad):,} of {everything:,} images cannot be read; {path} lists them with the reasons"
    if len(bad) > config.data.max_bad_fraction * everything:
        shown = printable(bad[0].path)
        raise DataError(
            f"config.data.dir: {told} (the first: {shown}: {bad[0].reason}), more than config.data.max_bad_fraction="
            f"{config.data.max_bad_fraction}; mend or remove them, or raise that limit"
        )
    say(console, f"{told}; the others are used")


def check_alike(setting: Setting) -> None:
    """Checks that all processes of a run found the same data and weights, wherever these lie on each machine.

    Raises:
      SharedRefusal: one found others.
    """
    processes.check_alike(
        {"config.data.dir": known_data(setting), "config.backbone_weights": setting.fingerprint or "none"}
    )


def known_data(setting: Setting) -> dict[str, Any]:
    """Returns what a checkpoint keeps of the data that it was made on."""
    counts = {"train": len(setting.splits.train), "database": len(setting.splits.database)}
    return {"digest": setting.data_digest, **counts}


def changed_data(setting: Setting, extra: dict[str, Any]) -> str:
    """Returns, in words, how the data differ from those that a checkpoint was made on; "" where they do not."""
    then, now = extra.get("data", {}), known_data(setting)
    if then == now:
        return ""
    counts = [f"{data.get('train', 0):,} + {data.get('database', 0):,} images" for data in (then, now)]
    return f"the data changed since the run began (training and database {counts[0]} then, {counts[1]} now)"
