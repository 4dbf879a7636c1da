"""The view bank of a frozen backbone: features of a few augmented views per image, computed once."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float16, Int, PRNGKeyArray, UInt8

from cib_jax.data import dataset
from cib_jax.data.dataset import Images
from cib_jax.distributed import multihost, sharding
from cib_jax.distributed.sharding import Axis
from cib_jax.errors import DataError
from cib_jax.models.encoder import Encoder, Params
from cib_jax.training.loop import Chunks, Steps
from cib_jax.training.train_step import Terms, TrainState, train_step, train_step_on_features

# training.view_bank: The view bank of a frozen backbone: features of a few augmented views per image, computed once.


STORED = np.float16
"""Half of float32's bytes; its rounding, 1 part in 2,048, is far below what another draw of a view changes."""
BYTES = np.dtype(STORED).itemsize


def build_view_bank(
    key: PRNGKeyArray,
    encoder: Encoder,
    frozen: Params,
    batches: Callable[[int, int], Iterable[UInt8[np.ndarray, "batch height width 3"]]],
    *,
    count: int,
    batch_size: int,
    views: int,
    family: str = "photo",
    on_images: Callable[[int], None] = lambda images: None,
    read: Callable[[int], Float16[np.ndarray, "images features"] | None] = lambda view: None,
    write: Callable[[int, Float16[np.ndarray, "images features"]], None] = lambda view, features: None,
    over: Mesh | None = None,
) -> Float16[Array, "views images features"]:
    """Returns features of `views` views of every image, drawn from the same family as in training.

    Args:
      key: a random key; view k of image i depends on it, k and i alone, not on the batch size.
      encoder: whose backbone is frozen.
      frozen: the backbone's parameters.
      batches: gives the images from one to before another, in order, at each call.
      count: how many images there are.
      batch_size: how many of them a batch holds.
      views: how many per image.
      family: of the augmentation.
      on_images: told the number of views done after each batch, of those that this process computes.
      read: gives a view's features where they were kept earlier, else None.
      write: is given each view's features that were computed now, as soon as they are there.
      over: this process's devices that compute a batch each at the same time; None: one.

    Of several processes, each computes its share of the batches; every one gets all features.

    Raises:
      BankError: a feature is not finite or beyond float16's range, ±65,504.
    """
    axis, mine = sharding.axis_of(over), multihost.share_of_batches(count, batch_size)
    size = min(batch_size, count)
    compute = jax.jit(
        sharding.shard_rows(functools.partial(_features, encoder=encoder, family=family, axis=axis), over)
    )
    frozen = sharding.replicate(frozen, over)

    def of_view(view: int) -> Callable[[np.ndarray, int], Array]:
        drawn_by = jax.random.fold_in(key, view)
        return lambda images, first: compute(frozen, images, first, drawn_by)

    bank = np.empty((views, count, encoder.backbone.features), STORED)
    for view, rows in enumerate(bank):
        kept = read(view)
        if multihost.all_processes(kept is not None):
            rows[:] = kept
            on_images(mine.stop - mine.start)
            continue
        start, part = mine.start, batches(mine.start, mine.stop)
        for features in sharding.map_batches(of_view(view), part, on_images, size=size, first=start, over=over):
            rows[start : start + len(features)] = features
            start += len(features)
        if multihost.is_distributed():
            rows[:] = np.concatenate(multihost.gather(rows[mine]))
        if not np.isfinite(rows).all():
            raise DataError(
                f"config.train.views: features of {encoder.backbone.name} are not finite or beyond ±65,504, the range "
                "of the bank's float16; set it to 0 for fresh views at every step, or check the backbone's weights"
            )
        write(view, rows)
    return jnp.asarray(bank)


def _features(
    frozen: Params,
    images: UInt8[Array, "batch height width 3"],
    first: Int[Array, ""],
    key: PRNGKeyArray,
    *,
    encoder: Encoder,
    family: str,
    axis: Axis,
) -> Float16[Array, "batch features"]:
    rows = images.shape[0]
    numbers = first + sharding.first_row(rows, axis) + jnp.arange(rows)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
    return encoder.features({}, frozen, encoder.view_each(keys, images, family=family)).astype(STORED)


def draw_pairs(
    key: PRNGKeyArray,
    bank: Float[Array, "views images features"],
    indices: Int[Array | np.ndarray, " batch"],
    axis: Axis = None,
) -> tuple[Float[Array, "batch features"], Float[Array, "batch features"]]:
    """Returns features, in float32, of two different views, drawn evenly, of each image named in `indices`.

    With an `axis` (see `spread`), `indices` are this device's.
    """
    views = bank.shape[0]
    key1, key2 = jax.random.split(key)
    first = sharding.draw_sharded(lambda shape: jax.random.randint(key1, shape, 0, views), indices.shape, axis)
    second = (
        first + sharding.draw_sharded(lambda shape: jax.random.randint(key2, shape, 1, views), indices.shape, axis)
    ) % views
    return bank[first, indices].astype(jnp.float32), bank[second, indices].astype(jnp.float32)


# training.feed: What training is fed in each epoch: indices into a view bank or into images on the device, or streamed images.


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
    axis = sharding.axis_of(mesh)

    def step(state: TrainState, held: tuple[Array, Array | None], indices: Array, key: PRNGKeyArray) -> Stepped:
        bank, known = held
        # A third part of the step's key: `train_step_on_features` splits the same key for its bits.
        pairs = draw_pairs(jax.random.fold_in(key, 2), bank, indices, axis)
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
    axis = sharding.axis_of(mesh)

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
    axis = sharding.axis_of(mesh)

    def step(state: TrainState, frozen: Params, batch: tuple[Array, Array | None], key: PRNGKeyArray) -> Stepped:
        images, known = batch
        return train_step(state, frozen, images, key, coordinates=known, axis=axis, **method)

    rows = sharding.local_rows(mesh, batch_size)

    def chunks(epoch: int, first: int = 0) -> Iterable[Any]:
        # Of each batch, what this process's devices hold: it decodes no other image.
        order = _batches(seed, epoch, len(images), batch_size)[first:, rows].reshape(-1)
        parts = dataset.stream(images, order, len(rows), stored_size=stored_size)
        for number, part in enumerate(parts):
            known = _of(coordinates, order[number * len(rows) :][: len(rows)])
            yield sharding.global_batch((part, known), rows, mesh, batch_size)

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
    return dataset.epoch_order(seed, epoch, count)[: steps * batch_size].reshape(steps, batch_size)


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
        program, held = sharding.shard_steps(program, mesh), sharding.replicate(held, mesh)
    jitted = jax.jit(program, donate_argnums=0)
    return lambda state, chunk, first, key: jitted(state, held, chunk, first, key)
