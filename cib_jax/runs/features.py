"""Features and codes of a run's images: read from the feature cache if they are there, otherwise computed and kept."""

import functools
import hashlib
import importlib.resources
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from importlib.resources.abc import Traversable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Float32, PRNGKeyArray, Shaped, UInt8

from cib_jax import console
from cib_jax.augment.augment import image_keys
from cib_jax.codes import byte_count
from cib_jax.config import build, loaded_files
from cib_jax.console import print_message
from cib_jax.data import cache
from cib_jax.data.cache import DamagedError, FeatureCache
from cib_jax.data.dataset import ImageSet, identity
from cib_jax.distributed import multihost, sharding
from cib_jax.errors import ConfigError
from cib_jax.inference.hasher import Hasher
from cib_jax.models import encoder
from cib_jax.models.encoder import Params, plain_features
from cib_jax.runs.context import Batches, Network, RunContext
from cib_jax.training import input_pipeline
from cib_jax.training.input_pipeline import ImageBatches

PART = 4096
"""Images per file of features, approximately: what an interrupted run can lose, and what is in memory at a time."""

FRESH_VIEWS = 10
"""Views of each image for a baseline, where a run has no view bank; an even number."""

# Files that decide the features of images: if one of them changes, so may the features, and the cache is not used.
CODE = (
    "augment/augment.py",
    "augment/geometry.py",
    "augment/color.py",
    "distributed/sharding.py",
    "data/dataset.py",
    "data/photos.py",
    "training/input_pipeline.py",
)


def of_views(
    run: Network, images: ImageSet, views: int, title: str, *, stream: str = "view bank"
) -> Float16[Array, "views images features"]:
    """Returns a frozen backbone's features of `views` random views of each image, with a progress bar.

    Networks that are side by side compute theirs, the same views, one after the other, so that the cache serves them
    together and alone.
    """
    batches = run.repeatable_batches(images)
    key = build.key(run.config, stream)
    if not run.joined:
        return _of_views(run, key, images, batches, views, title)
    named = [(network, f"{title}, {network.encoder.backbone.name}") for network in run.joined]
    banks = [_of_views(network, key, images, batches, views, its_title) for network, its_title in named]
    return jnp.concatenate(banks, axis=2)


def _of_views(
    run: Network, key: PRNGKeyArray, images: ImageSet, batches: Callable[..., Batches], views: int, title: str
) -> Float16[Array, "views images features"]:
    config = run.config
    made_of = {"views": config.augment, "key": np.asarray(jax.random.key_data(key)).tolist()}
    cached = _CachedFeatures(run, made_of, images, batches)
    mine = multihost.share_of_batches(len(images), config.encode_batch)
    with console.progress_bar(run.console, title, (mine.stop - mine.start) * views) as advance:
        bank = input_pipeline.build_view_bank(
            key,
            run.encoder,
            run.frozen,
            ImageBatches(batches, len(images), config.encode_batch, run.mesh),
            views=views,
            family=config.augment,
            on_images=lambda count: advance(count, ""),
            store=_CachedViews(cached, (len(images), run.encoder.backbone.features)),
        )
    cached.report(title)
    return bank


def plain(
    run: RunContext, images: ImageSet, title: str, *, shared: bool = False
) -> Iterator[Float[np.ndarray, "rows features"]]:
    """Yields the features of unaugmented images, in order, about `PART` images at a time, with a progress bar.

    If `shared`, each of several processes gets only its own parts of the images, for `join_codes`.
    """
    batches = run.repeatable_batches(images)
    parts = _parts(run, len(images))
    if shared:
        parts = parts[jax.process_index() :: jax.process_count()]
    networks = run.joined or [run]
    title = f"{title}, {len(networks)} networks" if run.joined else title  # the bar counts the images of each
    total = sum(stop - start for start, stop in parts) * len(networks)
    with console.progress_bar(run.console, title, total, unit=run.noun) as advance:
        sources = [_PlainFeatures(network, images, batches, lambda count: advance(count, "")) for network in networks]
        for source in sources:
            source.compute_missing(parts)
        for part in parts:
            rows = [source.read(part) for source in sources]
            yield rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)
    for source in sources:
        source.cached.report(title)


class _PlainFeatures:
    """One network's features of unaugmented images, by parts (start, stop), cached if there is a cache."""

    def __init__(
        self, run: Network, images: ImageSet, batches: Callable[..., Batches], on_images: Callable[[int], None]
    ):
        self._run, self._batches, self._on_images = run, batches, on_images
        self._size = min(run.config.encode_batch, len(images))
        self._frozen = sharding.replicate(run.frozen, run.mesh)
        self.cached = _CachedFeatures(run, {"views": "none"}, images, batches)

    def compute_missing(self, parts: list[tuple[int, int]]) -> None:
        """Computes those that are not cached; of runs on the same images at the same time, each computes some."""
        names = {_name(part): part for part in parts}
        for name in self.cached.missing(names):
            self._compute(names[name])

    def read(self, part: tuple[int, int]) -> Float32[np.ndarray, "rows features"]:
        """Returns a part from the cache, or computes it."""
        rows = part[1] - part[0]
        features = self.cached.read(_name(part), (rows, self._run.encoder.backbone.features), np.float32)
        if features is None:
            return self._compute(part)
        if _name(part) not in self.cached.made:
            self._on_images(rows)
        return features

    def _compute(self, part: tuple[int, int]) -> Float32[np.ndarray, "rows features"]:
        run = self._run
        of_batches = sharding.map_batches(
            lambda batch, first: plain_features(run.encoder, {}, self._frozen, batch, run.mesh),
            self._batches(*part),
            self._on_images,
            size=self._size,
            over=run.mesh,
        )
        features = np.concatenate([np.asarray(rows) for rows in of_batches])
        self.cached.write(_name(part), features)
        return features


def _name(part: tuple[int, int]) -> str:
    return f"plain-{part[0]:09}"


def _parts(run: RunContext, count: int) -> list[tuple[int, int]]:
    """Returns start and stop of the parts of `count` images: whole batches, except for the last one."""
    size = run.config.encode_batch
    length = size * max(1, PART // size)
    return [(start, min(start + length, count)) for start in range(0, count, length)]


def join_codes(
    run: RunContext, count: int, mine: list[UInt8[np.ndarray, "rows bytes"]]
) -> UInt8[np.ndarray, "count bytes"]:
    """Returns the codes of all `count` images; `mine` are those of this process's parts."""
    if not multihost.is_distributed():
        return np.concatenate(mine)
    parts = _parts(run, count)
    codes = np.empty((count, byte_count(run.encoder.bits)), np.uint8)
    # Some processes have no part if there are fewer parts than processes.
    for process, rows in enumerate(multihost.gather(np.concatenate([codes[:0], *mine]))):
        done = 0
        for start, stop in parts[process :: jax.process_count()]:
            codes[start:stop] = rows[done : done + stop - start]
            done += stop - start
    return codes


def before_hashing(run: RunContext, images: ImageSet, title: str) -> Iterator[Float[np.ndarray, "rows features"]]:
    """Yields the inputs of a baseline: features of a frozen backbone; pixels, in its input size, if it is trained."""
    if run.features_stay or run.standard is not None:
        yield from plain(run, images, title)
        return
    compute = jax.jit(lambda batch, first: run.encoder.preprocess(batch).reshape(len(batch), -1))
    with console.progress_bar(run.console, title, len(images), unit=run.noun) as advance:
        yield from _in_parts(run, images, compute, lambda count: advance(count, ""))


def views_before_hashing(run: RunContext, images: ImageSet, title: str) -> Float16[np.ndarray, "views images features"]:
    """Returns the inputs of a baseline that learns from views: those of `before_hashing`, of views of each image.

    A frozen backbone's are its view bank; otherwise there are `FRESH_VIEWS` views of pixels, or of given features.

    Raises:
      ConfigError: A backbone is frozen without a view bank, or the views take more than `train.bank_mb`.
    """
    config = run.config
    if run.features_stay:
        if not config.train.views:
            raise ConfigError(
                "config.train.views must be at least 2 with a frozen backbone, got 0; set it, or leave the row out",
                field="config.train.views",
            )
        return np.asarray(of_views(run, images, config.train.views, title))
    width = 3 * run.encoder.image_size**2 if run.standard is None else len(run.standard.mean)
    size = math.ceil(FRESH_VIEWS * len(images) * width * input_pipeline.BYTES / 2**20)
    if size > config.train.bank_mb:
        raise ConfigError(
            f"config.train.bank_mb must be at least {size}, for {FRESH_VIEWS} views of {len(images):,} {run.noun}, "
            f"got {config.train.bank_mb}; raise it, or leave the row out",
            field="config.train.bank_mb",
        )

    two_views = functools.partial(run.encoder.two_views, family=config.augment)

    @jax.jit
    def compute(batch: Array, first: Array, key: PRNGKeyArray) -> Float16[Array, "batch 2 features"]:
        # One key per image, by its index in the whole set, so that views do not depend on the batch size.
        keys = image_keys(key, len(batch), first)
        views = jax.vmap(lambda key, image: two_views(key, image[None]))(keys, batch)
        return jnp.stack([view.reshape(len(batch), -1) for view in views], axis=1).astype(input_pipeline.STORED)

    pairs = []
    with console.progress_bar(run.console, title, len(images) * FRESH_VIEWS, unit="views") as advance:
        for pair in range(FRESH_VIEWS // 2):
            of_pair = functools.partial(compute, key=jax.random.fold_in(build.key(config, "view bank"), pair))
            parts = _in_parts(run, images, of_pair, lambda count: advance(2 * count, ""))
            pairs.append(np.concatenate(list(parts)))
    return np.concatenate(pairs, axis=1).swapaxes(0, 1)


def _in_parts(
    run: RunContext, images: ImageSet, compute: Callable[..., Array], on_images: Callable[[int], None]
) -> Iterator[Shaped[np.ndarray, "rows ..."]]:
    """Yields `compute(batch, index of its first image)` of all images, in order, `PART` at a time."""
    size = min(run.config.encode_batch, len(images))
    for start in range(0, len(images), PART):
        batches = run.batches(images, start, start + PART)
        rows = sharding.map_batches(compute, batches, on_images, size=size, first=start)
        yield np.concatenate([np.asarray(row) for row in rows])


def codes(run: RunContext, params: Params, images: ImageSet, title: str) -> UInt8[np.ndarray, "n bytes"]:
    """Returns the packed codes of a set, equal to those of `Hasher.encode`, with a progress bar."""
    if run.features_stay:
        features = plain(run, images, title, shared=True)
        return join_codes(run, len(images), [codes_of_features(run, params, part) for part in features])
    hasher = Hasher(run.encoder, params, run.frozen, devices=sharding.mesh_size(run.mesh))
    parts, mine = _parts(run, len(images))[jax.process_index() :: jax.process_count()], []
    size = min(run.config.encode_batch, len(images))
    with console.progress_bar(run.console, title, sum(stop - start for start, stop in parts), unit=run.noun) as advance:
        for start, stop in parts:
            batches = run.batches(images, start, stop)
            mine.append(hasher.encode_batches(batches, lambda count: advance(count, ""), size=size))
    return join_codes(run, len(images), mine)


def logits(run: RunContext, params: Params, images: ImageSet, title: str) -> Float32[np.ndarray, "n bits"]:
    """Returns the logits of a set, equal to those of `Hasher.logits`, with a progress bar, in every process."""
    if run.features_stay:
        parts = plain(run, images, title)
        return np.concatenate([logits_of_features(run, params, part) for part in parts])
    hasher = Hasher(run.encoder, params, run.frozen, devices=sharding.mesh_size(run.mesh))
    size = min(run.config.encode_batch, len(images))
    with console.progress_bar(run.console, title, len(images), unit=run.noun) as advance:
        return hasher.logits_of_batches(run.batches(images), lambda count: advance(count, ""), size=size)


def logits_of_features(
    run: RunContext, params: Params, features: Float[np.ndarray, "n features"]
) -> Float32[np.ndarray, "n bits"]:
    """Returns the logits of features of unaugmented images."""
    return _of_features(run, params, features, encoder.logits_of_features)


def codes_of_features(
    run: RunContext, params: Params, features: Float[np.ndarray, "n features"]
) -> UInt8[np.ndarray, "n bytes"]:
    """Returns the packed codes of features of unaugmented images."""
    return _of_features(run, params, features, encoder.packed_of_features)


def _of_features(
    run: RunContext, params: Params, features: Float[np.ndarray, "n features"], compute: Callable[..., Array]
) -> np.ndarray:
    size = min(run.config.encode_batch, len(features))
    params = sharding.replicate(params, run.mesh)
    batches = (features[start : start + size] for start in range(0, len(features), size))
    rows = sharding.map_batches(
        lambda batch, first: compute(run.encoder, params, batch, run.mesh), batches, size=size, over=run.mesh
    )
    return np.concatenate([np.asarray(row) for row in rows])


def cache_key(run: Network, images: ImageSet, batches: Callable[..., Batches]) -> dict[str, Any]:
    """Returns everything that decides a frozen backbone's features of images, except for their views."""
    return {
        # Data sets that know what their files hold are not decoded to find their features.
        "images": identity(images.images) or cache.digest_of_images(batches()),
        "stored_size": run.config.data.stored_size,
        "backbone": run.encoder.backbone.name,
        "weights": run.fingerprint,
        "image_size": run.encoder.image_size,
        "dtype": run.encoder.backbone_dtype,
        "batch": run.config.encode_batch,
        "device": jax.devices()[0].device_kind,
        "devices": sharding.mesh_size(run.mesh),
        "jax": jax.__version__,
        "code": digest_of_code(),
        **({"own code": [pathlib.Path(file).read_text() for file in files]} if (files := loaded_files()) else {}),
    }


class _CachedFeatures:
    """The cached parts of one set of features. Errors of the cache are reported, and never end the run."""

    def __init__(self, run: Network, made_of: dict[str, Any], images: ImageSet, batches: Callable[..., Batches]):
        self.console, config = run.console, run.config
        self.max_bytes = config.cache.mb * 2**20
        self.parts_found = 0
        self.made: set[str] = set()  # parts that this run has written
        self.cache: FeatureCache | None = None
        if config.cache.dir == "none" or run.standard is not None:  # given features are in a file already
            return
        root = pathlib.Path(config.cache.dir).expanduser() if config.cache.dir else cache.home() / "features"
        self.cache = FeatureCache(root, made_of | cache_key(run, images, batches))

    def read(self, part: str, shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."] | None:
        if self.cache is None:
            return None
        features = None
        try:
            features = self.cache.read(part, shape, dtype)
        except DamagedError as error:
            print_message(self.console, f"{error}; it is computed again")
        except OSError as error:
            self._disable(error)
        self.parts_found += features is not None and part not in self.made
        return features

    def write(self, part: str, features: Shaped[np.ndarray, "..."]) -> None:
        if self.cache is None:
            return
        try:
            self.cache.write(part, features)
            self.made.add(part)
            self.cache.prune(self.max_bytes)
        except OSError as error:
            self._disable(error)

    def in_turn(self, parts: Iterable[str]) -> Iterable[str]:
        """Returns the parts, last those that other runs compute, in order for the processes of one run."""
        return parts if self.cache is None or multihost.is_distributed() else self.cache.in_turn(parts)

    def missing(self, parts: Iterable[str]) -> Iterator[str]:
        """Yields the parts to compute and write, unless another run has written them in the meantime."""
        if self.cache is not None and not multihost.is_distributed():
            for part in self.cache.in_turn(parts):
                if self.cache is not None and not self.cache.has(part):  # None after a failed write
                    yield part

    def _disable(self, error: OSError) -> None:
        assert self.cache is not None
        print_message(
            self.console,
            f"Features are not kept for later runs: {error.filename or self.cache.folder}: {error.strerror or error}; "
            "this run continues without, and --config.cache.dir=DIR names another folder",
        )
        self.cache = None

    def report(self, title: str) -> None:
        if self.cache is not None and self.parts_found:
            print_message(self.console, f"{title}: read from {self.cache.folder}")


class _CachedViews:
    """The features of each view, as the view bank reads and writes them."""

    def __init__(self, cached: _CachedFeatures, shape: tuple[int, int]):
        self._cached, self._shape = cached, shape

    def in_turn(self, views: int) -> Iterator[int]:
        for part in self._cached.in_turn(f"view-{view:04}" for view in range(views)):
            yield int(part.removeprefix("view-"))

    def read(self, view: int) -> Float16[np.ndarray, "images features"] | None:
        return self._cached.read(f"view-{view:04}", self._shape, input_pipeline.STORED)

    def write(self, view: int, features: Float16[np.ndarray, "images features"]) -> None:
        self._cached.write(f"view-{view:04}", features)


@functools.cache
def digest_of_code(package: Traversable | None = None) -> str:
    """Returns a digest of the source files that decide features: those of `CODE` and of all models."""
    package = package or importlib.resources.files("cib_jax")
    files = [package / name for name in CODE]
    files += sorted((file for file in (package / "models").iterdir() if file.name.endswith(".py")), key=str)
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
