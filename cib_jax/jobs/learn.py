"""An encoder learnt from a sample of the photos that are to be indexed, where none is given."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import ml_collections
import numpy as np
import rich.console
from jaxtyping import UInt8

from cib_jax import fitting
from cib_jax.backbones import registry, weights
from cib_jax.config import checking, from_config
from cib_jax.config.field_values import ConfigError
from cib_jax.data.images import DataError
from cib_jax.data.items import Photos
from cib_jax.devices import parallel
from cib_jax.hashing.hasher import Hasher
from cib_jax.jobs import progress, setting
from cib_jax.jobs.presenting import say

FEWEST = 16
"""Photos without which nothing can be learnt."""
FEW = 500
"""Photos below which it is told that there are few."""


def learn(found: Photos, config: ml_collections.ConfigDict, console: rich.console.Console) -> Hasher:
    """Returns an encoder trained, without labels, on photos drawn from `found`.

    Args:
      found: the photos; those that cannot be read are left out.
      config: of an experiment on images. Its `data.train_images` says how many photos are drawn, 0: all.
      console: where to report.

    Raises:
      ConfigError: the config is for features.
      DataError: fewer than 16 photos can be read, or fewer than devices share a batch.
      DevicesError, PartsError: the devices, or parts of `micro_batch`, do not go into `batch_size`.
      WeightsError: the backbone's weights are not to be had.
    """
    if config.backbone == "none":
        raise ConfigError("config.backbone: 'none' is for features; photos need a network")
    pretrained = registry.get(config.backbone).convert is not None
    setting.tell_of_fetching(config, console)
    params = weights.load_pretrained(config.backbone, config.backbone_weights) if pretrained else None
    images = _drawn(found, config, console)
    if len(images) < FEWEST:
        raise DataError(
            f"--images: {found.place} has {len(images)} photos that can be read, but at least {FEWEST} are needed to "
            "learn from; add some, or give --workdir=RUN, a trained run's folder"
        )
    few = ", which are few: more photos, or --workdir=RUN of a trained run, give better codes"
    say(
        console,
        f"No --workdir of a trained run: learning {config.bits}-bit codes from {len(images):,} of the photos"
        f"{few if len(images) < FEW else ''}",
    )
    batch_size, micro_batch = _batch(len(images), found, config)
    side = images.shape[1]
    views = config.train.views if config.frozen else 0
    # Another bar for the epochs once the views are there: its images per second are of others.
    with contextlib.ExitStack() as bars:
        on_views = bars.enter_context(progress.bar(console, "Learning: views", views * len(images)))

        @functools.cache
        def on_epoch() -> Callable[[int, str], None]:
            bars.close()
            return bars.enter_context(progress.bar(console, "Learning: codes", config.epochs * len(images)))

        hasher = fitting.fit(
            images,
            bits=config.bits,
            backbone=config.backbone,
            backbone_params=params,
            frozen=config.frozen,
            fine_tune=checking.fine_tune(config),
            image_size=config.image_size,
            hidden=config.hidden,
            objective=config.objective,
            temperature=config.temperature,
            beta=config.beta,
            stochastic=config.binary == "stochastic",
            sharpness=config.sharpness,
            teacher=from_config.teacher(config),
            augment=config.augment,
            epochs=config.epochs,
            batch_size=batch_size,
            learning_rate=config.learning_rate,
            views=views,
            micro_batch=micro_batch,
            devices=config.devices,
            seed=config.seed,
            on_views=lambda more: on_views(more, ""),
            on_epoch=lambda report: on_epoch()(len(images), ""),
        )
    return dataclasses.replace(hasher, stored_size=side, batch_size=config.encode_batch)


def _batch(count: int, found: Photos, config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Returns batch size and images of a device at a time: as the config says, or as so few photos allow."""
    if config.batch_size <= count:
        return config.batch_size, config.micro_batch
    devices = parallel.size(parallel.local_mesh(config.devices))
    # Whole parts on each device; all at once, where even one part is more than there are.
    part = config.micro_batch if devices * config.micro_batch <= count else 0
    unit = devices * max(part, 1)
    size = count // unit * unit
    if not size:
        raise DataError(
            f"--images: {found.place} has {count} photos that can be read, fewer than the {devices} devices that share "
            "a batch; set --config.devices=1, or give more photos"
        )
    return size, part


def _drawn(
    found: Photos, config: ml_collections.ConfigDict, console: rich.console.Console
) -> UInt8[np.ndarray, "images side side 3"]:
    """Returns photos in an order drawn by `data.seed`, so many as are wanted and can be read."""
    side = config.data.stored_size or config.image_size or registry.get(config.backbone).image_size
    wanted = config.data.train_images if config.data.train_images > 0 else len(found.names)
    wanted = min(wanted, len(found.names))
    order = np.random.default_rng(config.data.seed).permutation(len(found.names)).tolist()
    images = np.empty((wanted, side, side, 3), np.uint8)
    count = 0
    with progress.bar(console, "Reading some photos", wanted) as moved:

        def due() -> Iterator[int]:
            for number in order:
                if count == wanted:
                    return
                yield number

        for _, read in dataclasses.replace(found, size=side, see=False).read([due()]):
            if read.content is not None and count < wanted:
                images[count] = read.content
                count += 1
                moved(1, "")
    return images[:count]
