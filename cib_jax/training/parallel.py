"""The devices that share each batch: one mesh of one axis, and programs of steps spread over it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cib_jax.errors import Refusal

AXIS = "data"
"""The mesh axis over which batches are spread; everything else is on every device as a whole."""

WHOLE = PartitionSpec()
ROWS = PartitionSpec(None, AXIS)
"""Of a chunk [steps, batch, …]: the rows of each batch."""


class DevicesError(Refusal):
    """There are not as many devices as were asked for, or a batch cannot be spread over them."""


def mesh(devices: int, batch_size: int) -> Mesh | None:
    """Returns the mesh of the first `devices` local devices (0: all), None where it would be a single one.

    Raises:
      DevicesError: there are fewer, or `batch_size` is no multiple of them.
    """
    local = jax.local_devices()
    if devices > len(local):
        raise DevicesError(f"config.devices: {devices} are wanted, but this machine has {len(local)}; 0 takes all")
    count = devices or len(local)
    if batch_size % count:
        raise DevicesError(
            f"config.batch_size: {batch_size} images cannot be spread evenly over {count} devices; choose a multiple "
            f"of {count}, or fewer with config.devices"
        )
    return Mesh(local[:count], (AXIS,)) if count > 1 else None


def rows_of_one(batch_size: int, over: Mesh | None) -> int:
    """Returns how many images of a batch each device holds."""
    return batch_size // (over.size if over else 1)


def spread(program: Callable[..., Any], over: Mesh) -> Callable[..., Any]:
    """Returns a program (state, held, chunk, first, key) → (state, terms) with the rows of its batches spread.

    `program` must bring its results to the same values on every device, as steps with `axis=AXIS` do.
    """
    return jax.shard_map(
        program,
        mesh=over,
        in_specs=(WHOLE, WHOLE, ROWS, WHOLE, WHOLE),
        out_specs=WHOLE,
        # The gradients are summed by hand, once, in the step.
        check_vma=False,
    )


def everywhere(tree: Any, over: Mesh) -> Any:
    """Returns arrays as a whole on every device."""
    return jax.device_put(tree, NamedSharding(over, WHOLE))
