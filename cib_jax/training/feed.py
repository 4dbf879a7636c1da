"""What a step is fed in each epoch: indices into a view bank or into images on the device, or streamed images."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cib_jax.data import loader
from cib_jax.data.sources import Images
from cib_jax.encoder import Params
from cib_jax.training import view_bank
from cib_jax.training.loop import Step
from cib_jax.training.state import TrainState
from cib_jax.training.step import Terms, train_step, train_step_on_features


class Feed(NamedTuple):
    """A jitted step and the batches it takes; every batch is full, what remains of an epoch is left out."""

    step: Step
    epoch_batches: Callable[[int], Iterable[Any]]


def from_bank(
    bank: Float[Array, "views images features"], *, seed: int, batch_size: int, method: dict[str, Any]
) -> Feed:
    """Feeds features of two different views of each image out of a bank.

    Args:
      bank: see `view_bank.build`.
      seed: decides the order of images.
      batch_size: images per step.
      method: the keyword arguments of `train_step_on_features`.
    """

    def step(state: TrainState, held: Array, indices: np.ndarray, key: jax.Array) -> tuple[TrainState, Terms]:
        # A third part of the step's key: `train_step_on_features` splits the same key for its bits.
        pairs = view_bank.draw_pairs(jax.random.fold_in(key, 2), held, indices)
        return train_step_on_features(state, *pairs, key, **method)

    return Feed(_bound(step, bank), lambda epoch: _index_batches(seed, epoch, bank.shape[1], batch_size))


def from_device(
    images: UInt8[Array, "images height width 3"],
    frozen: Params,
    *,
    seed: int,
    batch_size: int,
    method: dict[str, Any],
) -> Feed:
    """Feeds images that live on the device; `method` holds the keyword arguments of `train_step`."""

    def step(state: TrainState, held: tuple[Params, Array], indices: np.ndarray, key: jax.Array):
        frozen, images = held
        return train_step(state, frozen, images[indices], key, **method)

    return Feed(_bound(step, (frozen, images)), lambda epoch: _index_batches(seed, epoch, len(images), batch_size))


def from_stream(
    images: Images, frozen: Params, *, seed: int, batch_size: int, stored_size: int, method: dict[str, Any]
) -> Feed:
    """Feeds images decoded on the host as they are needed: the batches that `from_device` would give."""

    def step(state: TrainState, frozen: Params, images: np.ndarray, key: jax.Array):
        return train_step(state, frozen, images, key, **method)

    def batches(epoch: int) -> Iterable[np.ndarray]:
        order = loader.epoch_order(seed, epoch, len(images))
        return loader.stream(images, order, batch_size, stored_size=stored_size, drop_remainder=True)

    return Feed(_bound(step, frozen), batches)


def _index_batches(seed: int, epoch: int, count: int, batch_size: int) -> Iterable[np.ndarray]:
    order = loader.epoch_order(seed, epoch, count)
    return (order[start : start + batch_size] for start in range(0, count - batch_size + 1, batch_size))


def _bound(step: Callable[..., tuple[TrainState, Terms]], held: Any) -> Step:
    # What never changes is an argument of the program, not a constant inside it: a bank of gigabytes would be copied
    # into the executable.
    jitted = jax.jit(step, donate_argnums=0)
    return lambda state, batch, key: jitted(state, held, batch, key)
