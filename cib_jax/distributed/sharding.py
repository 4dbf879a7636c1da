"""A batch spread over devices: which of its rows are here, and random numbers that do not depend on it.

Everything takes the name of the mesh axis over which the batch is spread, or None where it is whole."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped, UInt8

from cib_jax.errors import DevicesError

# devices.spread: A batch spread over devices: which of its rows are here, and random numbers that do not depend on it.
#
# Everything takes the name of the mesh axis over which the batch is spread, or None where it is whole.

Axis = str | None

Tree = TypeVar("Tree")


def first_row(rows: int, axis: Axis) -> Int[Array, ""] | int:
    """Returns where in the whole batch this device's `rows` rows begin."""
    return 0 if axis is None else jax.lax.axis_index(axis) * rows


def draw_sharded(drawing: Callable[[tuple[int, ...]], Array], shape: tuple[int, ...], axis: Axis) -> Array:
    """Returns this device's rows of `drawing` of the whole batch's shape, the same however the batch is spread.

    Every device draws for all of them, which costs less than a key for each row, and keeps its own.
    """
    if axis is None:
        return drawing(shape)
    whole = drawing((shape[0] * jax.lax.axis_size(axis), *shape[1:]))
    return jax.lax.dynamic_slice_in_dim(whole, first_row(shape[0], axis), shape[0])


def sum_over_devices(shares: Tree, axis: Axis) -> Tree:
    """Returns the sums of the devices' shares, leaf by leaf."""
    return shares if axis is None else jax.lax.psum(shares, axis)


def parts(axis: Axis) -> int:
    """Returns over how many devices the batch is spread."""
    return 1 if axis is None else jax.lax.axis_size(axis)


# devices.parallel: The devices that share work: one mesh of one axis, programs spread over it, arrays laid out on it.


AXIS = "data"
"""The mesh axis over which batches are spread; everything else is on every device as a whole."""

WHOLE = PartitionSpec()
ROWS = PartitionSpec(AXIS)
ROWS_OF_STEPS = PartitionSpec(None, AXIS)
"""Of a chunk [steps, batch, …]: the rows of each batch."""


def make_mesh(devices: int, batch_size: int) -> Mesh | None:
    """Returns the mesh of the devices that share each batch of training, None where it would be a single one.

    Args:
      devices: how many of this process's; 0: all. Where several processes work together, all of all.
      batch_size: images of a batch, on all of them together.

    Raises:
      DevicesError: there are fewer, or `batch_size` is no multiple of them.
    """
    if jax.process_count() > 1:
        if devices not in (0, jax.device_count()):
            raise DevicesError(
                f"config.devices: {devices} are wanted, but {jax.process_count()} processes take part with all their "
                f"{jax.device_count()} devices; leave it at 0"
            )
        chosen = jax.devices()
    else:
        chosen = jax.local_devices()
        if devices > len(chosen):
            raise DevicesError(f"config.devices: {devices} are wanted, but this machine has {len(chosen)}; 0 takes all")
        chosen = chosen[: devices or len(chosen)]
    if batch_size % len(chosen):
        raise DevicesError(
            f"config.batch_size: {batch_size} images cannot be spread evenly over {len(chosen)} devices; choose a "
            f"multiple of {len(chosen)}, or fewer with config.devices"
        )
    return Mesh(chosen, (AXIS,)) if len(chosen) > 1 else None


def local_mesh(devices: int = 0) -> Mesh | None:
    """Returns the mesh of this process's first `devices` devices (0: all), None where it would be a single one.

    For work that needs no other process, such as encoding.
    """
    chosen = jax.local_devices()[: devices or None]
    return Mesh(chosen, (AXIS,)) if len(chosen) > 1 else None


def mesh_size(over: Mesh | None) -> int:
    """Returns how many devices a mesh has, 1 where there is none."""
    return over.size if over else 1


def axis_of(over: Mesh | None) -> Axis:
    """Returns the axis over which batches are spread, None where there is no mesh."""
    return AXIS if over else None


def shard_steps(program: Callable[..., Any], over: Mesh) -> Callable[..., Any]:
    """Returns a program (state, held, chunk, first, key) → (state, terms) with the rows of its batches spread.

    `program` must bring its results to the same values on every device, as steps with `axis=AXIS` do.
    """
    return jax.shard_map(
        program,
        mesh=over,
        in_specs=(WHOLE, WHOLE, ROWS_OF_STEPS, WHOLE, WHOLE),
        out_specs=WHOLE,
        # The gradients are summed by hand, once, in the step.
        check_vma=False,
    )


def shard_rows(program: Callable[..., Array], over: Mesh | None) -> Callable[..., Array]:
    """Returns a program (held, rows, …) → rows that computes each device's rows there, and no row from another.

    Every device runs what one alone would run on as many rows: the same results, up to rounding.
    """
    if over is None:
        return program
    return lambda held, rows, *more: jax.shard_map(
        program, mesh=over, in_specs=(WHOLE, ROWS, *[WHOLE] * len(more)), out_specs=ROWS, check_vma=False
    )(held, rows, *more)


def replicate(tree: Any, over: Mesh | None) -> Any:
    """Returns arrays as a whole on every device, of all processes' where the mesh spans several."""
    if over is None:
        return tree
    sharding = NamedSharding(over, WHOLE)
    if not _spans_processes(over):
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def to_local(tree: Any) -> Any:
    """Returns arrays that are whole on every device as arrays of this process alone."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def local_rows(over: Mesh | None, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Returns which rows of a batch the devices of this process hold, in rising order."""
    rows = np.arange(batch_size)
    if over is None or not _spans_processes(over):
        return rows
    places = NamedSharding(over, ROWS).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([rows[place] for place in places]))


def global_batch(rows: Any, here: Int[np.ndarray, " rows"], over: Mesh | None, batch_size: int) -> Any:
    """Returns a chunk [1, batch, …] of one batch of which this process holds the `rows` that `rows_here` named.

    `rows` may be a tree of arrays [rows, …], each of which becomes such a chunk.
    """
    if over is None or not _spans_processes(over):
        return jax.tree.map(lambda array: array[None], rows)

    def spread(array: np.ndarray) -> Any:
        def part(place: Any) -> np.ndarray:
            return array[None, np.searchsorted(here, np.arange(batch_size)[place[1]])]

        shape = (1, batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(over, ROWS_OF_STEPS), part)

    return jax.tree.map(spread, rows)


def _spans_processes(over: Mesh) -> bool:
    return over.is_multi_process


# devices.encoding: A pure function over many images: batch by batch, one compiled program, the next batch read while one is computed.


def map_batches(
    function: Callable[[UInt8[np.ndarray, "batch height width 3"], int], Shaped[Array, "batch ..."]],
    batches: Iterable[UInt8[np.ndarray, "rows height width 3"]],
    on_images: Callable[[int], None] = lambda images: None,
    *,
    size: int = 0,
    first: int = 0,
    over: Mesh | None = None,
) -> Iterator[Shaped[Array, "rows ..."]]:
    """Yields `function(batch, index of its first image)` of every batch, or of as many at once as there are devices.

    What is smaller is padded with black images, whose rows are cut off again, so that a jitted `function` is compiled
    once.

    Args:
      function: of a batch of that size, or of a batch for each device (`parallel.by_rows`).
      batches: of uint8 images, none larger than `size`.
      size: of the batches that `function` gets on one device; 0 takes the first one's.
      on_images: told the number of images of each batch when its result is there.
      first: index of the first image.
      over: the devices that compute a batch each at the same time; None: one.
    """
    start = first
    pending: Shaped[Array, "rows ..."] | None = None
    batches, devices = iter(batches), mesh_size(over)
    while group := list(itertools.islice(batches, devices)):
        size = size or len(group[0])
        images = group[0] if len(group) == 1 else np.concatenate(group)
        filling = size * devices - len(images)
        whole = np.pad(images, ((0, filling), *[(0, 0)] * (images.ndim - 1))) if filling else images
        # Dispatched before the one before is waited for: the device is never idle while the host decodes.
        following = function(whole, start)[: len(images)]
        if pending is not None:
            on_images(len(pending.block_until_ready()))
            yield pending
        pending = following
        start += len(images)
    if pending is not None:
        on_images(len(pending.block_until_ready()))
        yield pending
