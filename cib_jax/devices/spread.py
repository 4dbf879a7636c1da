"""A batch spread over devices: which of its rows are here, and random numbers that do not depend on it.

Everything takes the name of the mesh axis over which the batch is spread, or None where it is whole.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import Array, Int

Axis = str | None

Tree = TypeVar("Tree")


def first_row(rows: int, axis: Axis) -> Int[Array, ""] | int:
    """Returns where in the whole batch this device's `rows` rows begin."""
    return 0 if axis is None else jax.lax.axis_index(axis) * rows


def draw(drawing: Callable[[tuple[int, ...]], Array], shape: tuple[int, ...], axis: Axis) -> Array:
    """Returns this device's rows of `drawing` of the whole batch's shape, the same however the batch is spread.

    Every device draws for all of them, which costs less than a key for each row, and keeps its own.
    """
    if axis is None:
        return drawing(shape)
    whole = drawing((shape[0] * jax.lax.axis_size(axis), *shape[1:]))
    return jax.lax.dynamic_slice_in_dim(whole, first_row(shape[0], axis), shape[0])


def total(shares: Tree, axis: Axis) -> Tree:
    """Returns the sums of the devices' shares, leaf by leaf."""
    return shares if axis is None else jax.lax.psum(shares, axis)


def parts(axis: Axis) -> int:
    """Returns over how many devices the batch is spread."""
    return 1 if axis is None else jax.lax.axis_size(axis)
