"""What training is fed in each epoch: indices into a view bank or into images on the device, or streamed images."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from cib_jax.data import loader
from cib_jax.data.images import Images
from cib_jax.devices import parallel
from cib_jax.encoder import Params
from cib_jax.training import view_bank
from cib_jax.training.loop import Chunks, Steps
from cib_jax.training.state import TrainState
from cib_jax.training.step import Terms, train_step, train_step_on_features

SCAN_STEPS = 256
"""The most steps that run as one program: about a second of work on a CPU, after which something can be told."""

Stepped = tuple[TrainState, Terms]
Step = Callable[[TrainState, Any, Any, PRNGKeyArray], Stepped]


class Feed(NamedTuple):
    """A program of some steps and the chunks it takes, an epoch's at a time; what does not fill a batch is left out."""

    steps: Steps
    epoch_chunks: Chunks


def from_bank(
    bank: Float[Array, "views images features"],
    *,
    seed: int,
    batch_size: int,
    method: dict[str, Any],
    coordinates: Float[np.ndarray, "images dimensions"] | None = None,
    mesh: Mesh | None = None,
) -> Feed:
    """Feeds features of two different views of each image out of a bank; an epoch is one program, or a few.

    Args:
      bank: see `view_bank.build`.
      seed: decides the order of images.
      batch_size: images per step.
      method: the keyword arguments of `train_step_on_features`.
      coordinates: of the images, for the objective that learns from them.
      mesh: the devices that share each batch; None: one.
    """
    axis = parallel.axis_of(mesh)

    def step(state: TrainState, held: tuple[Array, Array | None], indices: Array, key: PRNGKeyArray) -> Stepped:
        bank, known = held
        # A third part of the step's key: `train_step_on_features` splits the same key for its bits.
        pairs = view_bank.draw_pairs(jax.random.fold_in(key, 2), bank, indices, axis)
        return train_step_on_features(state, *pairs, key, coordinates=_of(known, indices), axis=axis, **method)

    return Feed(
        _bound(_scan(step), (bank, coordinates), mesh), _chunks_of_indices(seed, bank.shape[1], batch_size, SCAN_STEPS)
    )


def from_device(
    images: UInt8[Array, "images height width 3"],
    frozen: Params,
    *,
    seed: int,
    batch_size: int,
    method: dict[str, Any],
    coordinates: Float[np.ndarray, "images dimensions"] | None = None,
    mesh: Mesh | None = None,
) -> Feed:
    """Feeds images, or features, that live on the device.

    Images one step a program, features an epoch, whose steps are too short to be started one by one; `method`: the
    keyword arguments of `train_step`; `coordinates` and `mesh` as in `from_bank`.
    """
    axis = parallel.axis_of(mesh)

    def step(state: TrainState, held: tuple[Params, Array, Array | None], indices: Array, key: PRNGKeyArray) -> Stepped:
        frozen, images, known = held
        return train_step(state, frozen, images[indices], key, coordinates=_of(known, indices), axis=axis, **method)

    scans = method["encoder"].backbone.takes == "features"
    program, longest = (_scan, SCAN_STEPS) if scans else (_alone, 1)
    return Feed(
        _bound(program(step), (frozen, images, coordinates), mesh),
        _chunks_of_indices(seed, len(images), batch_size, longest),
    )


def from_stream(
    images: Images,
    frozen: Params,
    *,
    seed: int,
    batch_size: int,
    stored_size: int,
    method: dict[str, Any],
    coordinates: Float[np.ndarray, "images dimensions"] | None = None,
    mesh: Mesh | None = None,
) -> Feed:
    """Feeds images decoded on the host as they are needed, one step a program: the batches of `from_device`."""
    axis = parallel.axis_of(mesh)

    def step(state: TrainState, frozen: Params, batch: tuple[Array, Array | None], key: PRNGKeyArray) -> Stepped:
        images, known = batch
        return train_step(state, frozen, images, key, coordinates=known, axis=axis, **method)

    rows = parallel.rows_here(mesh, batch_size)

    def chunks(epoch: int, first: int = 0) -> Iterable[Any]:
        # Of each batch, what this process's devices hold: it decodes no other image.
        order = _batches(seed, epoch, len(images), batch_size)[first:, rows].reshape(-1)
        parts = loader.stream(images, order, len(rows), stored_size=stored_size)
        for number, part in enumerate(parts):
            known = _of(coordinates, order[number * len(rows) :][: len(rows)])
            yield parallel.batch_of((part, known), rows, mesh, batch_size)

    return Feed(_bound(_alone(step), frozen, mesh), chunks)


def _of(known: Array | np.ndarray | None, indices: Array | np.ndarray) -> Any:
    return None if known is None else known[indices]


def _chunks_of_indices(seed: int, count: int, batch_size: int, longest: int) -> Chunks:
    """Returns a function from an epoch to its order, as arrays [steps, batch_size] of up to `longest` steps."""

    def chunks(epoch: int, first: int = 0) -> Iterable[np.ndarray]:
        batches = _batches(seed, epoch, count, batch_size)
        return (batches[start : start + longest] for start in range(first, len(batches), longest))

    return chunks


def _batches(seed: int, epoch: int, count: int, batch_size: int) -> Int[np.ndarray, "steps batch"]:
    """Returns which images make each step of an epoch."""
    steps = count // batch_size
    return loader.epoch_order(seed, epoch, count)[: steps * batch_size].reshape(steps, batch_size)


def _scan(step: Step) -> Callable[..., Stepped]:
    """Returns a program of all steps of a chunk; step s of the run uses the root key folded with s."""

    def program(state: TrainState, held: Any, chunk: Array, first: Array, key: PRNGKeyArray) -> Stepped:
        def one(state: TrainState, at: tuple[Array, Array]) -> Stepped:
            batch, number = at
            return step(state, held, batch, jax.random.fold_in(key, number))

        state, terms = jax.lax.scan(one, state, (chunk, first + jnp.arange(len(chunk))))
        return state, _with_parameter_norm(terms, state)

    return program


def _alone(step: Step) -> Callable[..., Stepped]:
    """Returns the same for chunks of one step, without a loop: with images, a step takes long enough."""

    def program(state: TrainState, held: Any, chunk: Array, first: Array, key: PRNGKeyArray) -> Stepped:
        only = jax.tree.map(lambda batch: batch[0], chunk)
        state, terms = step(state, held, only, jax.random.fold_in(key, first))
        return state, _with_parameter_norm({name: value[None] for name, value in terms.items()}, state)

    return program


def _with_parameter_norm(terms: Terms, state: TrainState) -> Terms:
    # Of the chunk's end alone: at every step it would cost a seventh of the head's time, and it moves slowly.
    return terms | {"parameter_norm": jnp.full_like(terms["loss"], optax.tree.norm(state.params))}


def _bound(program: Callable[..., Stepped], held: Any, mesh: Mesh | None) -> Steps:
    # What never changes is an argument of the program, not a constant inside it: a bank of gigabytes would be copied
    # into the executable.
    if mesh is not None:
        program, held = parallel.steps(program, mesh), parallel.everywhere(held, mesh)
    jitted = jax.jit(program, donate_argnums=0)
    return lambda state, chunk, first, key: jitted(state, held, chunk, first, key)
