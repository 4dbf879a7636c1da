"""Sharding of batches over devices: the mesh, programs that run on it, and random numbers that do not depend on it.

Inside `jax.shard_map`, functions take `axis`, the name of the mesh axis over which the batch is divided, or None if
one device has the whole batch. Outside, they take `over`, the mesh, or None if there is only one device.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from cib_jax.errors import DevicesError

Axis = str | None
Tree = TypeVar("Tree")
P = ParamSpec("P")
R = TypeVar("R")

AXIS = "data"  # the mesh's only axis, over which batches are divided; everything else is whole on every device
WHOLE = PartitionSpec()
ROWS = PartitionSpec(AXIS)
ROWS_OF_STEPS = PartitionSpec(None, AXIS)  # of a chunk [steps, batch, …], by the rows of each batch


# Inside jax.shard_map.


def first_row(rows: int, axis: Axis) -> Int[Array, ""] | int:
    """Returns the index in the whole batch of the first of this device's `rows` rows."""
    return 0 if axis is None else jax.lax.axis_index(axis) * rows


def draw_sharded(draw: Callable[[tuple[int, ...]], Array], shape: tuple[int, ...], axis: Axis) -> Array:
    """Returns this device's rows, of shape `shape`, of random numbers that do not depend on the number of devices."""
    if axis is None:
        return draw(shape)
    # Every device draws for all devices, and keeps its own rows. This costs less than one key per row.
    whole = draw((shape[0] * jax.lax.axis_size(axis), *shape[1:]))
    return jax.lax.dynamic_slice_in_dim(whole, first_row(shape[0], axis), shape[0])


def draw_two(
    key: PRNGKeyArray, batch: int, views: int, axis: Axis = None
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """Returns the numbers of two different views of each item, uniformly drawn among the pairs of its `views` views."""
    first_key, distance_key = jax.random.split(key)
    first = draw_sharded(lambda shape: jax.random.randint(first_key, shape, 0, views), (batch,), axis)
    distance = draw_sharded(lambda shape: jax.random.randint(distance_key, shape, 1, views), (batch,), axis)
    return first, (first + distance) % views


def sum_over_devices(shares: Tree, axis: Axis) -> Tree:
    """Returns the sums of the devices' shares, leaf by leaf."""
    return shares if axis is None else jax.lax.psum(shares, axis)


def vary_like(tree: Tree, example: Array) -> Tree:
    """Returns arrays that JAX takes to differ between devices, as `example` does.

    With `check_vma=True`, JAX sums the gradient of an array that is the same on all devices by itself, before
    `sum_over_devices`, and no loop replaces such an array by values of each device. With `check_vma=False`, and outside
    `jax.shard_map`, nothing changes.
    """
    axes = jax.typeof(example).mat.varying

    def cast(leaf: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(leaf).mat.varying))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree) if axes else tree


def parts(axis: Axis) -> int:
    """Returns the number of devices over which the batch is divided."""
    return 1 if axis is None else jax.lax.axis_size(axis)


# On explicit meshes, which `jax.make_mesh` makes by default.


def on_explicit_mesh(*, rows: bool) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator that lets a function take arrays whose types hold their sharding over an explicit mesh.

    There, JAX asks for the sharding of every intermediate result. The decorated function leaves it to the compiler, as
    on other meshes, and only its results are given one.

    Args:
      rows: Whether the results are divided as the rows of the first divided argument; otherwise they are whole.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            leaves, tree = jax.tree.flatten((args, kwargs))
            places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
            shardings = [jax.typeof(leaves[place]).sharding for place in places]
            explicit = [each for each in shardings if AxisType.Explicit in each.mesh.axis_types]
            if not explicit:
                return function(*args, **kwargs)
            divided = next((each.spec[0] for each in explicit if len(each.spec) and each.spec[0]), None)

            def call(arrays: list[Array]) -> R:
                for place, array in zip(places, arrays, strict=True):
                    leaves[place] = array
                args, kwargs = jax.tree.unflatten(tree, leaves)
                return function(*args, **kwargs)

            result = PartitionSpec(divided) if rows else WHOLE
            with jax.sharding.use_abstract_mesh(explicit[0].mesh):
                # Without `jit`, JAX would look for a mesh for each constant inside.
                return jax.jit(jax.sharding.auto_axes(call, out_sharding=result))([leaves[place] for place in places])

        return wrapped

    return decorate


# Meshes.


def make_mesh(devices: int, batch_size: int) -> Mesh | None:
    """Returns the mesh of the devices that share each batch of training, or None for a single device.

    `devices` is the number of this process's devices to use; 0 uses all. Several processes always use all theirs.
    """
    processes = jax.process_count()
    everything = jax.devices() if processes > 1 else jax.local_devices()
    if processes > 1 and devices not in (0, len(everything)):
        raise DevicesError(
            f"config.devices must be 0 for a run of {processes} processes, which use all their {len(everything)} "
            f"devices, got {devices}",
            field="config.devices",
        )
    if devices > len(everything):
        raise DevicesError(
            f"config.devices must be at most {len(everything)}, the number of devices of this machine, got {devices}; "
            "0 uses all",
            field="config.devices",
        )
    chosen = everything[: devices or None]
    if batch_size % len(chosen):
        raise DevicesError(
            f"config.batch_size must be a multiple of the number of devices, {len(chosen)}, got {batch_size}; choose "
            "another batch size, or fewer devices with config.devices",
            field="config.batch_size",
        )
    return Mesh(chosen, (AXIS,)) if len(chosen) > 1 else None


def local_mesh(devices: int = 0) -> Mesh | None:
    """Returns the mesh of this process's first `devices` devices (0: all) for its own work; None for one."""
    chosen = jax.local_devices()[: devices or None]
    return Mesh(chosen, (AXIS,)) if len(chosen) > 1 else None


def mesh_size(over: Mesh | None) -> int:
    """Returns the number of devices of a mesh, 1 for None."""
    return over.size if over else 1


def axis_of(over: Mesh | None) -> Axis:
    """Returns the name of the axis over which a mesh divides batches, None for None."""
    return AXIS if over else None


# Programs and arrays on a mesh.


def shard_steps(program: Callable[..., Any], over: Mesh) -> Callable[..., Any]:
    """Returns the program (state, held, chunk, first, key) → (state, terms), with the rows of each batch divided.

    `program` must compute the same results on every device, as training steps with `axis=AXIS` do.
    """
    return jax.shard_map(
        program,
        mesh=over,
        in_specs=(WHOLE, WHOLE, ROWS_OF_STEPS, WHOLE, WHOLE),
        out_specs=WHOLE,
        # With this check, shard_map would sum the gradients by itself; the step sums them, once.
        check_vma=False,
    )


def shard_rows(program: Callable[..., Array], over: Mesh | None) -> Callable[..., Array]:
    """Returns the program (held, rows, …) → rows, in which each device computes its own rows from its own rows.

    Every device runs what a single device would run on as many rows: the results are the same up to rounding.
    """
    if over is None:
        return program
    return lambda held, rows, *more: jax.shard_map(
        program, mesh=over, in_specs=(WHOLE, ROWS, *[WHOLE] * len(more)), out_specs=ROWS, check_vma=False
    )(held, rows, *more)


def replicate(tree: Any, over: Mesh | None) -> Any:
    """Returns arrays copied to every device of a mesh, which may span several processes."""
    if over is None:
        return tree
    sharding = NamedSharding(over, WHOLE)
    if not over.is_multi_process:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def to_local(tree: Any) -> Any:
    """Returns replicated arrays as arrays of this process alone."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def local_rows(over: Mesh | None, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Returns the indices of the rows of a batch that this process's devices hold, in ascending order."""
    rows = np.arange(batch_size)
    if over is None or not over.is_multi_process:
        return rows
    slices = NamedSharding(over, ROWS).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([rows[part] for part in slices]))


def global_batch(rows: Any, here: Int[np.ndarray, " rows"], over: Mesh | None, batch_size: int) -> Any:
    """Returns a chunk [1, batch, …] of one batch, from the tree of arrays [rows, …] that this process holds.

    `here` has the indices of these rows in the batch, from `local_rows`.
    """
    if over is None or not over.is_multi_process:
        return jax.tree.map(lambda array: array[None], rows)
    sharding = NamedSharding(over, ROWS_OF_STEPS)

    def chunk(array: np.ndarray) -> Array:
        def part(index: Any) -> np.ndarray:
            return array[None, np.searchsorted(here, np.arange(batch_size)[index[1]])]

        return jax.make_array_from_callback((1, batch_size, *array.shape[1:]), sharding, part)

    return jax.tree.map(chunk, rows)


def map_batches(
    function: Callable[[np.ndarray, int], Array],
    batches: Iterable[Shaped[np.ndarray, "_ ..."]],
    on_images: Callable[[int], None] = lambda images: None,
    *,
    size: int = 0,
    first: int = 0,
    over: Mesh | None = None,
) -> Iterator[Shaped[Array, "_ ..."]]:
    """Yields `function(batch, index of its first image)` for each batch, or for one batch per device at a time.

    Smaller batches are padded with black images, and their rows removed from the result, so that a jitted `function`
    is compiled once.

    Args:
      function: Function of one batch of `size` images, or of one for each device (as from `shard_rows`).
      batches: Batches of at most `size` images.
      on_images: Function that is called with the number of images of each batch when its result is complete.
      size: Number of images that each device gets; 0 takes the size of the first batch.
      first: Index of the first image.
      over: Mesh of the devices that compute one batch each at the same time.
    """
    pending: Array | None = None
    batches, devices = iter(batches), mesh_size(over)
    while group := list(itertools.islice(batches, devices)):
        size = size or len(group[0])
        images = group[0] if len(group) == 1 else np.concatenate(group)
        missing = size * devices - len(images)
        padded = np.pad(images, ((0, missing), *[(0, 0)] * (images.ndim - 1))) if missing else images
        # Dispatched before the previous result is awaited: the device works while the host decodes the next batch.
        following = function(padded, first)[: len(images)]
        if pending is not None:
            on_images(len(pending.block_until_ready()))
            yield pending
        pending = following
        first += len(images)
    if pending is not None:
        on_images(len(pending.block_until_ready()))
        yield pending
