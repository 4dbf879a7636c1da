"""What the jobs of one run share: its config, folder, data and network, checked before anything heavy starts."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable

import ml_collections
import numpy as np
import rich.console
from jaxtyping import UInt8

from cib_jax import from_config
from cib_jax.data import loader
from cib_jax.data.images import ImageSet
from cib_jax.data.splits import Splits
from cib_jax.encoder import Encoder, Params

Batches = Iterable[UInt8[np.ndarray, "batch height width 3"]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run's surroundings; what changes in the run is passed beside it."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    console: rich.console.Console
    splits: Splits
    encoder: Encoder
    initial: Params
    """The parameters to train, as they start."""
    frozen: Params
    fingerprint: str
    """Of the backbone weights that were loaded; "" if none were."""

    def batches(self, images: ImageSet, start: int = 0, stop: int | None = None) -> Batches:
        """Returns images `start` to `stop` of a set, in order, in batches for encoding."""
        size = min(self.config.encode_batch, len(images))
        order = np.arange(len(images))[start:stop]
        return loader.stream(images.images, order, size, stored_size=self.config.data.stored_size)

    def repeatable_batches(self, images: ImageSet) -> Callable[..., Batches]:
        """Returns a function that gives the set's batches, or those of images `start` to `stop`, again at each call.

        A set that fits into `data.resident_mb` is decoded only once.
        """
        stored_size = self.config.data.stored_size
        if loader.size_in_bytes(images.images, stored_size=stored_size) > self.config.data.resident_mb * 2**20:
            return functools.partial(self.batches, images)
        whole, size = loader.materialise(images.images, stored_size=stored_size), self.config.encode_batch

        def batches(start: int = 0, stop: int | None = None) -> Batches:
            part = whole[start:stop]
            return (part[at : at + size] for at in range(0, len(part), size))

        return batches


def prepare(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, console: rich.console.Console, *, trained: bool = False
) -> Setting:
    """Draws the splits and makes the encoder; `trained` says that its parameters will be those of a checkpoint.

    Raises:
      ConfigError, DataError, WeightsError: something cannot be had or does not fit.
    """
    splits = from_config.draw_splits(config)
    return Setting(config, workdir, console, splits, *from_config.encoder(config, trained=trained))
