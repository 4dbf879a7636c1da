"""Low-rank corrections of kernels (LoRA, https://arxiv.org/abs/2106.09685): a kernel stays, two thin factors learn."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

Tree = dict[Any, Any]


def kernels(shapes: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields the path and the rows and columns of every kernel that can be corrected, in the order of the tree.

    Those are products [inputs, outputs] and convolutions [height, width, inputs, outputs], whose rows are the pixels
    under it, channel by channel: the first factor is then a convolution to few channels, the second a 1×1 one. A
    depthwise kernel has a row for each tap and no inputs to mix, and is left as it is.

    Args:
      shapes: a state, or the shapes of one.
      path: put before the names.
    """
    for name, inner in shapes.items():
        if isinstance(inner, Mapping):
            yield from kernels(inner, f"{path}{name}/")
        elif name == "kernel" and (len(inner.shape) == 2 or (len(inner.shape) == 4 and inner.shape[2] > 1)):
            yield f"{path}{name}", (int(np.prod(inner.shape[:-1])), inner.shape[-1])


def create(key: PRNGKeyArray, state: Mapping[Any, Any], rank: int) -> Tree:
    """Returns factors "a" [rows, rank] and "b" [rank, columns] of every kernel, in a tree like the state's.

    "b" is 0, so that the corrected state is at first the state itself; "a" is normal with deviation 1/√rows.
    """
    made: Tree = {}
    for number, (path, (rows, columns)) in enumerate(kernels(state)):
        inner = made
        for name in path.split("/"):
            inner = inner.setdefault(int(name) if name.isdigit() else name, {})
        inner["a"] = jax.random.normal(jax.random.fold_in(key, number), (rows, rank)) * rows**-0.5
        inner["b"] = jnp.zeros((rank, columns))
    return made


def corrected(state: Mapping[Any, Any], factors: Tree, scale: float) -> Tree:
    """Returns the state whose kernels are W + scale · A·B, for training: gradients flow to the factors."""

    def one(kernel: Array, a: Array, b: Array) -> Array:
        # Not in the short products of an accelerator, so that what is trained is what `merged` gives.
        return kernel + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(kernel.shape)

    return _each(state, factors, one)


def merged(state: Mapping[Any, Any], factors: Tree, scale: float) -> Tree:
    """Returns the same for use: computed once on the host, in float64, and rounded to float32."""

    def one(kernel: Array, a: Array, b: Array) -> Array:
        product = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        return jnp.asarray((np.asarray(kernel, np.float64) + scale * product.reshape(kernel.shape)).astype(np.float32))

    return _each(state, factors, one)


def _each(state: Mapping[Any, Any], factors: Tree, function: Callable[[Array, Array, Array], Array]) -> Tree:
    made: Tree = {}
    for name, inner in state.items():
        if name not in factors:
            made[name] = inner
        elif isinstance(inner, Mapping):
            made[name] = _each(inner, factors[name], function)
        else:
            made[name] = function(inner, factors[name]["a"], factors[name]["b"])
    return made
