"""What a frozen backbone gives in a job: read from the cache where it is there, computed and kept where it is not."""

import contextlib
import functools
import hashlib
import importlib.resources
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float16, Float32, Shaped, UInt8

from cib_jax import console
from cib_jax.config import build
from cib_jax.console import print_message
from cib_jax.data import cache
from cib_jax.data.cache import DamagedError, FeatureCache
from cib_jax.data.dataset import ImageSet, identity
from cib_jax.distributed import multihost, sharding
from cib_jax.inference.hasher import Hasher
from cib_jax.models import encoder
from cib_jax.models.encoder import Params, plain_features
from cib_jax.runs.context import Batches, RunContext
from cib_jax.training import input_pipeline

PART = 4096
"""Images whose features make one file, about: what an interrupted run can lose, and what is held at a time."""

# What makes features of images: another text of one of these files may mean other features.
_CODE = (
    "augment/augment.py",
    "augment/geometry.py",
    "augment/color.py",
    "distributed/sharding.py",
    "data/dataset.py",
    "data/photos.py",
    "training/input_pipeline.py",
)


def bank(setting: RunContext) -> tuple[Float16[Array, "views images features"], float]:
    """Returns the view bank of the training images, and the seconds that it took."""
    begun = time.perf_counter()
    views = setting.config.train.views
    made = of_views(setting, setting.splits.train, views, f"View bank, {views} views")
    return made, time.perf_counter() - begun


def of_views(setting: RunContext, images: ImageSet, views: int, what: str) -> Float16[Array, "views images features"]:
    """Returns a frozen backbone's features of augmented views of images, with a bar named `what`."""
    config = setting.config
    key = build.key(config, "view bank")
    batches = setting.repeatable_batches(images)
    kept = _Kept(
        setting,
        {"views": config.augment, "key": np.asarray(jax.random.key_data(key)).tolist()},
        images,
        batches,
    )
    shape = (len(images), setting.encoder.backbone.features)
    mine = multihost.share_of_batches(len(images), config.encode_batch)
    with kept.alone(), console.progress_bar(setting.console, what, (mine.stop - mine.start) * views) as moved:
        made = input_pipeline.build_view_bank(
            key,
            setting.encoder,
            setting.frozen,
            batches,
            count=len(images),
            batch_size=config.encode_batch,
            views=views,
            family=config.augment,
            on_images=lambda count: moved(count, ""),
            read=lambda view: kept.read(f"view-{view:04}", shape, input_pipeline.STORED),
            write=lambda view, features: kept.write(f"view-{view:04}", features),
            over=setting.mesh,
        )
    kept.tell(what)
    return made


def plain(
    setting: RunContext, images: ImageSet, what: str, *, shared: bool = False
) -> Iterator[Float[np.ndarray, "rows features"]]:
    """Yields the features of unaugmented images, in order, about `PART` images at a time, with a bar named `what`.

    With `shared`, of several processes each gets its own part of the images; see `joined`.
    """
    batches = setting.repeatable_batches(images)
    kept = _Kept(setting, {"views": "none"}, images, batches)
    over = setting.mesh
    frozen = sharding.replicate(setting.frozen, over)
    size = min(setting.config.encode_batch, len(images))
    parts = _parts(setting, len(images))
    if shared:
        parts = parts[jax.process_index() :: jax.process_count()]
    with console.progress_bar(setting.console, what, sum(stop - start for start, stop in parts)) as moved:
        for start, stop in parts:
            name, shape = f"plain-{start:09}", (stop - start, setting.encoder.backbone.features)
            with kept.alone():
                features = kept.read(name, shape, np.float32)
                if features is None:
                    of_batches = sharding.map_batches(
                        lambda batch, first: plain_features(setting.encoder, {}, frozen, batch, over),
                        batches(start, stop),
                        lambda count: moved(count, ""),
                        size=size,
                        over=over,
                    )
                    features = np.concatenate([np.asarray(rows) for rows in of_batches])
                    kept.write(name, features)
                else:
                    moved(len(features), "")
            yield features
    kept.tell(what)


def _parts(setting: RunContext, count: int) -> list[tuple[int, int]]:
    """Returns where the parts of `count` images begin and end: whole batches, but for the last."""
    size = setting.config.encode_batch
    height = size * max(1, PART // size)
    return [(start, min(start + height, count)) for start in range(0, count, height)]


def joined(
    setting: RunContext, count: int, mine: list[UInt8[np.ndarray, "rows bytes"]]
) -> UInt8[np.ndarray, "count bytes"]:
    """Returns the codes of all `count` images, of which this process made those of its parts, `mine`."""
    if not multihost.is_distributed():
        return np.concatenate(mine)
    parts = _parts(setting, count)
    whole = np.empty((count, setting.encoder.bits // 8), np.uint8)
    # Of more processes than parts, some have none.
    for process, rows in enumerate(multihost.gather(np.concatenate([whole[:0], *mine]))):
        done = 0
        for start, stop in parts[process :: jax.process_count()]:
            whole[start:stop] = rows[done : done + stop - start]
            done += stop - start
    return whole


def before_hashing(setting: RunContext, images: ImageSet, what: str) -> Iterator[Float[np.ndarray, "rows features"]]:
    """Yields what a way to hash that learns no network gets of images: a frozen backbone's features, or the pixels.

    As `plain` does; the pixels, where the backbone learns, are those that it sees, one after another.
    """
    if setting.features_stay or setting.standard is not None:
        yield from plain(setting, images, what)
        return
    compute = jax.jit(lambda batch: setting.encoder.preprocess(batch).reshape(len(batch), -1))
    size = min(setting.config.encode_batch, len(images))
    with console.progress_bar(setting.console, what, len(images)) as moved:
        for start in range(0, len(images), PART):
            batches = setting.batches(images, start, start + PART)
            rows = sharding.map_batches(
                lambda batch, first: compute(batch), batches, lambda count: moved(count, ""), size=size
            )
            yield np.concatenate([np.asarray(row) for row in rows])


def codes(setting: RunContext, params: Params, images: ImageSet, what: str) -> UInt8[np.ndarray, "n bytes"]:
    """Returns the packed codes of a set, with a bar named `what`; they are those of `Hasher.encode`."""
    if setting.features_stay:
        features = plain(setting, images, what, shared=True)
        return joined(setting, len(images), [codes_of_features(setting, params, part) for part in features])
    # The backbone was trained, or there is none.
    hasher = Hasher(setting.encoder, params, setting.frozen, devices=sharding.mesh_size(setting.mesh))
    parts, mine = _parts(setting, len(images))[jax.process_index() :: jax.process_count()], []
    size = min(setting.config.encode_batch, len(images))
    with console.progress_bar(setting.console, what, sum(stop - start for start, stop in parts)) as moved:
        for start, stop in parts:
            batches = setting.batches(images, start, stop)
            mine.append(hasher.encode_batches(batches, lambda count: moved(count, ""), size=size))
    return joined(setting, len(images), mine)


def codes_of_features(
    setting: RunContext, params: Params, features: Float[np.ndarray, "n features"]
) -> UInt8[np.ndarray, "n bytes"]:
    """Returns the packed codes of features of unaugmented images."""
    return _of_features(setting, params, features, encoder.packed_of_features)


def logits_of_features(
    setting: RunContext, params: Params, features: Float[np.ndarray, "n features"]
) -> Float32[np.ndarray, "n bits"]:
    """Returns the logits of features of unaugmented images."""
    return _of_features(setting, params, features, encoder.logits_of_features)


def _of_features(
    setting: RunContext, params: Params, features: Float[np.ndarray, "n features"], compute: Callable[..., Array]
) -> np.ndarray:
    size = min(setting.config.encode_batch, len(features))
    over = setting.mesh
    params = sharding.replicate(params, over)
    rows = sharding.map_batches(
        lambda batch, first: compute(setting.encoder, params, batch, over),
        (features[start : start + size] for start in range(0, len(features), size)),
        size=size,
        over=over,
    )
    return np.concatenate([np.asarray(row) for row in rows])


class _Kept:
    """The cache of one set of features; what goes wrong with it is told, and never ends the run."""

    def __init__(self, setting: RunContext, made_of: dict[str, Any], images: ImageSet, batches: Callable[..., Batches]):
        self.console, config = setting.console, setting.config
        self.most_bytes = config.cache.mb * 2**20
        self.found, self.cache = 0, None
        if config.cache.dir == "none" or setting.standard is not None:  # features need not be kept twice
            return
        root = pathlib.Path(config.cache.dir).expanduser() if config.cache.dir else cache.home() / "features"
        self.cache = FeatureCache(
            root,
            made_of
            | {
                # Where files tell what they hold, nothing has to be decoded to find its features.
                "images": identity(images.images) or cache.digest_of_images(batches()),
                "stored_size": config.data.stored_size,
                "backbone": setting.encoder.backbone.name,
                "weights": setting.fingerprint,
                "image_size": setting.encoder.image_size,
                "dtype": config.backbone_dtype,
                "batch": config.encode_batch,
                "device": jax.devices()[0].device_kind,
                "devices": sharding.mesh_size(setting.mesh),
                "jax": jax.__version__,
                "code": _digest_of_code(),
            },
        )

    def read(self, part: str, shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."] | None:
        if self.cache is None:
            return None
        try:
            features = self.cache.read(part, shape, dtype)
        except DamagedError as error:
            print_message(self.console, f"{error}; it is computed again")
            return None
        except OSError as error:
            self._give_up(error)
            return None
        self.found += features is not None
        return features

    def write(self, part: str, features: Shaped[np.ndarray, "..."]) -> None:
        if self.cache is None:
            return
        try:
            self.cache.write(part, features)
            self.cache.prune(self.most_bytes)
        except OSError as error:
            self._give_up(error)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other runs from computing the same features at the same time.

        Of several processes of one run the first does: they wait for each other.
        """
        return (
            self.cache.exclusive()
            if self.cache is not None and multihost.is_first_process()
            else contextlib.nullcontext()
        )

    def _give_up(self, error: OSError) -> None:
        assert self.cache is not None
        print_message(
            self.console,
            f"Features are not kept for later runs: {error.filename or self.cache.folder}: {error.strerror or error}; "
            "this run goes on without, --config.cache.dir=DIR names another place",
        )
        self.cache = None

    def tell(self, what: str) -> None:
        if self.cache is not None and self.found:
            print_message(self.console, f"{what}: read from {self.cache.folder}")


@functools.cache
def _digest_of_code() -> str:
    package = importlib.resources.files("cib_jax")
    files = [package / name for name in _CODE]
    files += sorted((file for file in (package / "models").iterdir() if file.name.endswith(".py")), key=str)
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
