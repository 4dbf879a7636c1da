"""The input pipeline: feeds of images or features to training steps, and the view bank of a frozen backbone."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

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
from cib_jax.losses import OBJECTIVES
from cib_jax.models.encoder import Encoder, Params
from cib_jax.random_streams import fold_by_name
from cib_jax.training.loop import Feed, StepTerms
from cib_jax.training.train_step import Batch, Method, TrainState, update

STORED = np.float16  # of a view bank; its rounding is far smaller than the difference between two draws of a view
BYTES = np.dtype(STORED).itemsize

NUMBERS = ("temperature", "beta", "sharpness")
"""Fields of `Method` that are arguments of the compiled step, so that the trials of a search share one program."""
Numbers = dict[str, Any]  # float32 scalars by name

PROGRAMS = 32  # compiled steps that are kept for later runs of this process

SCAN_STEPS = 256
"""The most steps that run as one program: about a second of work on a CPU, after which progress can be reported."""


# The view bank: features of a few augmented views of every image, computed once.


@dataclasses.dataclass(frozen=True)
class ImageBatches:
    """`count` images that are read, several times, in batches of at most `batch_size`."""

    read: Callable[[int, int], Iterable[UInt8[np.ndarray, "batch height width 3"]]]
    """Returns the images from one index to before another, in order, in batches."""
    count: int
    batch_size: int
    mesh: Mesh | None = None  # devices of this process that compute a batch each at the same time; None is one device


@runtime_checkable
class ViewStore(Protocol):
    """A place where the features of each view are kept for other runs."""

    def in_turn(self, views: int) -> Iterable[int]:
        """Returns the numbers of the views in the order in which to make them, the same in all processes of a run."""

    def read(self, view: int) -> Float16[np.ndarray, "images features"] | None:
        """Returns the features of a view, or None if they are not there."""

    def write(self, view: int, features: Float16[np.ndarray, "images features"]) -> None:
        """Keeps the features of a view."""


def build_view_bank(
    key: PRNGKeyArray,
    encoder: Encoder,
    frozen: Params,
    images: ImageBatches,
    *,
    views: int,
    family: str = "photo",
    on_images: Callable[[int], None] = lambda images: None,
    store: ViewStore | None = None,
) -> Float16[Array, "views images features"]:
    """Returns the features of `views` random views of every image, for a backbone that is not trained.

    View k of image i depends on the key, k and i alone, not on the batch size. Of several processes, each computes its
    share of the batches, calls `on_images` with the number of views of each, and gets all features.
    """
    mine = multihost.share_of_batches(images.count, images.batch_size)
    compute = view_features(encoder, family, images.mesh)
    frozen = sharding.replicate(frozen, images.mesh)

    bank = np.empty((views, images.count, encoder.backbone.features), STORED)
    for view in range(views) if store is None else store.in_turn(views):
        rows = bank[view]
        kept = store.read(view) if store is not None else None
        if multihost.all_processes(kept is not None):
            rows[:] = kept
            on_images(mine.stop - mine.start)
            continue
        view_key = jax.random.fold_in(key, view)
        start = mine.start
        for features in sharding.map_batches(
            lambda batch, first: compute(frozen, batch, first, view_key),  # noqa: B023 - used up in this iteration
            images.read(mine.start, mine.stop),
            on_images,
            size=min(images.batch_size, images.count),
            first=mine.start,
            over=images.mesh,
        ):
            rows[start : start + len(features)] = features
            start += len(features)
        if multihost.is_distributed():
            rows[:] = np.concatenate(multihost.gather(rows[mine]))
        if not np.isfinite(rows).all():
            raise DataError(
                f"config.train.views must be 0 (fresh views at every step) for this backbone, got {views}: features of "
                f"{encoder.backbone.name} are not finite or beyond ±65,504, the range of the bank's float16; set it to "
                "0, or check the backbone's weights",
                field="config.train.views",
            )
        if store is not None:
            store.write(view, rows)
    return jnp.asarray(bank)


@functools.lru_cache(maxsize=8)
def view_features(encoder: Encoder, family: str, mesh: Mesh | None) -> Callable[..., Array]:
    """Returns the compiled program (frozen, images, index of the first, key of a view) → features of that view."""
    axis = sharding.axis_of(mesh)

    def features(
        frozen: Params, images: UInt8[Array, "batch height width 3"], first: Int[Array, ""], key: PRNGKeyArray
    ) -> Float16[Array, "batch features"]:
        rows = images.shape[0]
        # One key per image, by its index in the whole set.
        indices = first + sharding.first_row(rows, axis) + jnp.arange(rows)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)
        return encoder.features({}, frozen, encoder.view_each(keys, images, family=family)).astype(STORED)

    return jax.jit(sharding.shard_rows(features, mesh))


def draw_pairs(
    key: PRNGKeyArray,
    bank: Float[Array, "views images features"],
    indices: Int[Array | np.ndarray, " batch"],
    axis: Axis = None,
) -> tuple[Float[Array, "batch features"], Float[Array, "batch features"]]:
    """Returns the features, in float32, of two different views, drawn uniformly, of each image in `indices`."""
    first, second = sharding.draw_two(key, len(indices), len(bank), axis)
    return bank[first, indices].astype(jnp.float32), bank[second, indices].astype(jnp.float32)


# Feeds: what each step takes, from a bank, from images on the device, or streamed from the host. Images that do not
# fill a batch are left out of an epoch, unless the order says that they make a smaller one. A smaller batch is another
# shape, so the step is compiled a second time for it.


Step = Callable[[TrainState, Any, Any, PRNGKeyArray], tuple[TrainState, dict[str, Array]]]
"""Function (state, arrays that stay on the device, batch, key of the step) → (state, terms)."""
Program = Callable[[TrainState, Any, Any, Array | int, PRNGKeyArray], tuple[TrainState, StepTerms]]
"""Function (state, arrays that stay on the device, chunk, number of its first step, root key) → (state, terms)."""


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which images make each batch, what else is known of them, and which devices share it (None: one)."""

    seed: int
    batch_size: int
    coordinates: Float[np.ndarray, "images dimensions"] | None = None
    """Coordinates of all images on a diffusion map; for the objective "diffusion" only."""
    mesh: Mesh | None = None
    partial_batch: bool = False
    """Whether an epoch ends with a smaller batch of the images that are left over."""


def from_bank(bank: Float[Array, "views images features"], method: Method, order: BatchOrder) -> Feed:
    """Returns a feed of features of two different views of each image; an epoch is one program, or a few."""
    chunks = _chunks_of_indices(order, bank.shape[1], SCAN_STEPS)
    return _feed(bank_steps, (bank, order.coordinates), chunks, method, order.mesh)


@functools.lru_cache(maxsize=PROGRAMS)
def bank_steps(method: Method, mesh: Mesh | None) -> Program:
    """Returns the compiled steps on a view bank, which take indices of images.

    They keep ((bank, coordinates or None), numbers that replace those of the method).
    """
    axis = sharding.axis_of(mesh)

    def step(
        state: TrainState, held: tuple[tuple[Array, Array | None], Numbers], indices: Array, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Array]]:
        (bank, coordinates), numbers = held
        pairs = draw_pairs(fold_by_name(key, "view pairs"), bank, indices, axis)
        batch = Batch(pairs, _rows(coordinates, indices))
        return update(state, {}, batch, key, dataclasses.replace(method, **numbers), axis)

    return _compile(_scan_steps(step), mesh)


def from_device(
    images: UInt8[Array, "images height width 3"] | Float[Array, "items *views features"],
    frozen: Params,
    method: Method,
    order: BatchOrder,
) -> Feed:
    """Returns a feed of images, or features, that stay on the device.

    A step on images is one program. Steps on features take so little time that many of them are one program.
    """
    longest = SCAN_STEPS if method.encoder.backbone.takes == "features" else 1
    chunks = _chunks_of_indices(order, len(images), longest)
    shape = images.shape[1:]
    if jax.default_backend() == "tpu":
        # A TPU pads the width of images to 128 pixels, and would rearrange all of them at every step to look some up.
        images = images.reshape(len(images), -1)
    return _feed(device_steps, (frozen, images, order.coordinates), chunks, method, order.mesh, shape)


@functools.lru_cache(maxsize=PROGRAMS)
def device_steps(method: Method, mesh: Mesh | None, shape: tuple[int, ...]) -> Program:
    """Returns the compiled steps on images of one `shape`, or features, that stay on the device.

    They take indices of images, and keep ((frozen, images, each of them flat or not, coordinates or None), numbers that
    replace those of the method).
    """
    axis = sharding.axis_of(mesh)

    def step(
        state: TrainState, held: tuple[tuple[Params, Array, Array | None], Numbers], indices: Array, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Array]]:
        (frozen, images, coordinates), numbers = held
        batch = Batch(images[indices].reshape(-1, *shape), _rows(coordinates, indices))
        return update(state, frozen, batch, key, dataclasses.replace(method, **numbers), axis)

    return _compile((_scan_steps if method.encoder.backbone.takes == "features" else _single_step)(step), mesh)


def from_stream(images: Images, frozen: Params, method: Method, order: BatchOrder, *, stored_size: int = 0) -> Feed:
    """Returns a feed of images that the host decodes when they are needed: the same batches as of `from_device`.

    With a `stored_size`, the host resizes them to that side in pixels.
    """

    def chunks(epoch: int, first: int = 0) -> Iterable[Any]:
        for batches in _batches(order, epoch, len(images), first):
            size = batches.shape[1]
            # Only the rows of each batch that the devices of this process hold: none decodes another one's images.
            rows = sharding.local_rows(order.mesh, size)
            mine = batches[:, rows].reshape(-1)
            parts = dataset.stream(images, mine, len(rows), stored_size=stored_size)
            for number, part in enumerate(parts):
                known = _rows(order.coordinates, mine[number * len(rows) :][: len(rows)])
                # Arrays of NumPy here, which become rows of arrays on all devices.
                yield sharding.global_batch(Batch(part, known), rows, order.mesh, size)  # type: ignore[arg-type]

    # No scan over steps, which would need all their images on the device at once.
    return _feed(stream_steps, frozen, chunks, method, order.mesh)


@functools.lru_cache(maxsize=PROGRAMS)
def stream_steps(method: Method, mesh: Mesh | None) -> Program:
    """Returns the compiled step on images from the host, which takes a `Batch`.

    It keeps (frozen parameters, numbers that replace those of the method).
    """
    axis = sharding.axis_of(mesh)

    def step(
        state: TrainState, held: tuple[Params, Numbers], batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Array]]:
        frozen, numbers = held
        return update(state, frozen, batch, key, dataclasses.replace(method, **numbers), axis)

    return _compile(_single_step(step), mesh)


def _rows(coordinates: Any, indices: Array | np.ndarray) -> Any:
    return None if coordinates is None else coordinates[indices]


def _chunks_of_indices(order: BatchOrder, count: int, longest: int) -> Callable[[int, int], Iterable[np.ndarray]]:
    """Returns a function from an epoch to its order, as arrays [steps, batch] of up to `longest` steps."""

    def chunks(epoch: int, first: int = 0) -> Iterable[np.ndarray]:
        for batches in _batches(order, epoch, count, first):
            yield from (batches[start : start + longest] for start in range(0, len(batches), longest))

    return chunks


def _batches(order: BatchOrder, epoch: int, count: int, first: int) -> list[Int[np.ndarray, "steps batch"]]:
    """Returns the indices of the images of each step of an epoch, from the step `first` on: whole batches, the rest."""
    steps = count // order.batch_size
    whole, rest = np.split(dataset.epoch_order(order.seed, epoch, count), [steps * order.batch_size])
    parts = [whole.reshape(steps, order.batch_size)[first:]]
    if order.partial_batch and len(rest):
        parts.append(rest[None][max(0, first - steps) :])
    return parts


def _scan_steps(step: Step) -> Program:
    """Returns a program of all steps of a chunk."""

    def program(state: TrainState, held: Any, chunk: Any, first: Array | int, key: PRNGKeyArray) -> Any:
        def one_step(state: TrainState, batch_and_number: tuple[Any, Array]) -> tuple[TrainState, dict[str, Array]]:
            batch, number = batch_and_number
            # The number of the step in the whole run, so that a resumed run draws what an undisturbed one would.
            return step(state, held, batch, jax.random.fold_in(key, number))

        state, terms = jax.lax.scan(one_step, state, (chunk, first + jnp.arange(len(chunk))))
        return state, _with_parameter_norm(terms, state)

    return program


def _single_step(step: Step) -> Program:
    """Returns a program of chunks of one step, without a loop."""

    def program(state: TrainState, held: Any, chunk: Any, first: Array | int, key: PRNGKeyArray) -> Any:
        batch = jax.tree.map(lambda array: array[0], chunk)
        state, terms = step(state, held, batch, jax.random.fold_in(key, first))
        return state, _with_parameter_norm({name: value[None] for name, value in terms.items()}, state)

    return program


def _with_parameter_norm(terms: StepTerms, state: TrainState) -> StepTerms:
    # Computed once per chunk: at every step it would take a seventh of the head's time, and it changes slowly.
    return terms | {"parameter_norm": jnp.full_like(terms["loss"], optax.tree.norm(state.params))}


def _compile(program: Program, mesh: Mesh | None) -> Program:
    return jax.jit(program if mesh is None else sharding.shard_steps(program, mesh), donate_argnums=0)


def _feed(
    steps: Callable[..., Program],
    held: Any,
    chunks: Callable[[int, int], Iterable[Any]],
    method: Method,
    mesh: Mesh | None,
    *shape: tuple[int, ...],
) -> Feed:
    """Returns a feed of compiled steps, those of an earlier feed if only `NUMBERS` or the data differ."""
    # A user's own loss gets Python numbers, and may read what has changed since it was compiled.
    own = callable(method.objective) or OBJECTIVES[method.objective].loss is not None
    numbers = {} if own else {name: jnp.asarray(getattr(method, name), jnp.float32) for name in NUMBERS}
    same: dict[str, Any] = dict.fromkeys(numbers, 1.0)
    compiled: Any = steps
    program = (compiled.__wrapped__ if own else compiled)(dataclasses.replace(method, **same), mesh, *shape)
    # `held` is an argument of the compiled program, not a constant inside it: a constant bank of gigabytes would be
    # copied into the executable.
    held = sharding.replicate(jax.tree.map(jnp.asarray, (held, numbers)), mesh)  # once, and not at every step
    return Feed(lambda state, chunk, first, key: program(state, held, chunk, first, key), chunks)
