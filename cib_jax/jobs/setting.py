"""What the jobs of one run share: its config, folder, data and network, checked before anything heavy starts."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

import ml_collections
import numpy as np
import rich.console
from jaxtyping import UInt8

from cib_jax import from_config
from cib_jax.data import loader
from cib_jax.data.sources import ImageSet
from cib_jax.data.splits import Splits
from cib_jax.encoder import Encoder, Params
from cib_jax.hasher import Hasher
from cib_jax.jobs import progress


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

    def batches(self, images: ImageSet) -> Iterable[UInt8[np.ndarray, "batch height width 3"]]:
        """Returns a set's images in order, in batches for encoding."""
        size = min(self.config.encode_batch, len(images))
        return loader.stream(images.images, np.arange(len(images)), size, stored_size=self.config.data.stored_size)

    def repeatable_batches(self, images: ImageSet) -> Callable[[], Iterable[UInt8[np.ndarray, "batch height width 3"]]]:
        """Returns a function that gives the set's batches again at each call; a set that fits is decoded only once."""
        stored_size = self.config.data.stored_size
        if loader.size_in_bytes(images.images, stored_size=stored_size) > self.config.data.resident_mb * 2**20:
            return lambda: self.batches(images)
        whole, size = loader.materialise(images.images, stored_size=stored_size), self.config.encode_batch
        return lambda: (whole[start : start + size] for start in range(0, len(whole), size))

    def encode(self, params: Params, images: ImageSet, what: str) -> UInt8[np.ndarray, "n bytes"]:
        """Returns the packed codes of a set, with a bar named `what`."""
        with progress.bar(self.console, what, len(images)) as moved:
            hasher = Hasher(self.encoder, params, self.frozen)
            return hasher.encode_batches(self.batches(images), lambda count: moved(count, ""))


def prepare(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, console: rich.console.Console, *, trained: bool = False
) -> Setting:
    """Draws the splits and makes the encoder; `trained` says that its parameters will be those of a checkpoint.

    Raises:
      ConfigError, DataError, WeightsError: something cannot be had or does not fit.
    """
    splits = from_config.draw_splits(config)
    return Setting(config, workdir, console, splits, *from_config.encoder(config, trained=trained))
