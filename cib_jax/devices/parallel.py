"""The devices that share work: one mesh of one axis, programs spread over it, arrays laid out on it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from cib_jax.devices.spread import Axis
from cib_jax.errors import Refusal

AXIS = "data"
"""The mesh axis over which batches are spread; everything else is on every device as a whole."""

WHOLE = PartitionSpec()
ROWS = PartitionSpec(AXIS)
ROWS_OF_STEPS = PartitionSpec(None, AXIS)
"""Of a chunk [steps, batch, …]: the rows of each batch."""


class DevicesError(Refusal):
    """There are not as many devices as were asked for, or a batch cannot be spread over them."""


def mesh(devices: int, batch_size: int) -> Mesh | None:
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


def size(over: Mesh | None) -> int:
    """Returns how many devices a mesh has, 1 where there is none."""
    return over.size if over else 1


def axis_of(over: Mesh | None) -> Axis:
    """Returns the axis over which batches are spread, None where there is no mesh."""
    return AXIS if over else None


def steps(program: Callable[..., Any], over: Mesh) -> Callable[..., Any]:
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


def by_rows(program: Callable[..., Array], over: Mesh | None) -> Callable[..., Array]:
    """Returns a program (held, rows, …) → rows that computes each device's rows there, and no row from another.

    Every device runs what one alone would run on as many rows: the same results, up to rounding.
    """
    if over is None:
        return program
    return lambda held, rows, *more: jax.shard_map(
        program, mesh=over, in_specs=(WHOLE, ROWS, *[WHOLE] * len(more)), out_specs=ROWS, check_vma=False
    )(held, rows, *more)


def everywhere(tree: Any, over: Mesh | None) -> Any:
    """Returns arrays as a whole on every device, of all processes' where the mesh spans several."""
    if over is None:
        return tree
    sharding = NamedSharding(over, WHOLE)
    if not _spans_processes(over):
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def here(tree: Any) -> Any:
    """Returns arrays that are whole on every device as arrays of this process alone."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def rows_here(over: Mesh | None, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Returns which rows of a batch the devices of this process hold, in rising order."""
    rows = np.arange(batch_size)
    if over is None or not _spans_processes(over):
        return rows
    places = NamedSharding(over, ROWS).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([rows[place] for place in places]))


def batch_of(rows: Any, here: Int[np.ndarray, " rows"], over: Mesh | None, batch_size: int) -> Any:
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
