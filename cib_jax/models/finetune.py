"""The trainable part of a backbone: everything, the last blocks, or low-rank factors of the kernels (LoRA).

LoRA (https://arxiv.org/abs/2106.09685) keeps a kernel W as it is and learns two thin factors, so that the layer uses
W + α / rank · A·B.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, PRNGKeyArray

from cib_jax.errors import ConfigError
from cib_jax.models.conv import ShapesOnly
from cib_jax.models.registry import Backbone
from cib_jax.models.state_dict import Tree

Leaf = Array | np.ndarray
State = Mapping[Any, Any]  # a network's parameters, or their shapes, as nested dicts


@dataclasses.dataclass(frozen=True)
class FineTune:
    """How a backbone that is not frozen learns: the fields of the config's group of this name.

    Examples:
      >>> import cib_jax as cib
      >>> cib.FineTune(blocks=3, learning_rate=1e-4).asked
      ('blocks', 'learning_rate')
    """

    blocks: int = 0
    """Number of last blocks that learn, with all layers after them; 0: the whole backbone learns."""
    learning_rate: float = 0.0
    """Learning rate of the backbone; 0: that of the head."""
    checkpointing: bool = False
    """Whether blocks are recomputed for their gradients instead of being kept: less memory, more time."""
    lora_rank: int = 0
    """Rank of LoRA's factors, which learn in place of the weights; 0: the weights themselves learn."""
    lora_alpha: float = 8.0
    """α of LoRA; factors are scaled by α / rank."""

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of the fields that change how a backbone learns."""
        return tuple(name for name in ("blocks", "learning_rate", "checkpointing", "lora_rank") if getattr(self, name))

    @property
    def keeps(self) -> bool:
        """Whether some loaded weights are kept although the backbone learns."""
        return bool(self.blocks or self.lora_rank)


def validate_fine_tune(how: FineTune, backbone: Backbone, image_size: int, *, frozen: bool, from_scratch: bool) -> None:
    """Raises `ConfigError` unless a network can be trained in this way; an `image_size` of 0 is its usual one."""
    for name in ("blocks", "learning_rate", "lora_rank"):
        value = getattr(how, name)
        if not (math.isfinite(value) and value >= 0):
            raise _error(name, f"must be 0 or more, got {value}")
        if name != "learning_rate" and value != int(value):
            raise _error(name, f"must be a whole number, got {value}")
    if not (math.isfinite(how.lora_alpha) and how.lora_alpha > 0):
        raise _error("lora_alpha", f"must be greater than 0, got {how.lora_alpha}")
    if not how.asked:
        return
    if frozen:
        name = how.asked[0]
        default, given = getattr(FineTune(), name), getattr(how, name)
        raise _error(name, f"must be {default} for a frozen backbone, got {given}; or set frozen to False")
    if not how.keeps:
        return
    if from_scratch:
        fault = f"must be 0, since {backbone.name} starts from random weights, which would mostly stay random"
        raise _error("lora_rank" if how.lora_rank else "blocks", fault)
    if backbone.networks:
        fault = f"must be 0 for {backbone.name}, which is several networks, got"
        name = "lora_rank" if how.lora_rank else "blocks"
        raise _error(name, f"{fault} {getattr(how, name)}; choose one of {', '.join(backbone.networks)}, or train all")
    shapes = state_shapes(backbone, image_size)
    count = len(shapes[_blocks_name(shapes)])
    if how.blocks > count:
        fault = f"must be at most {count}, the blocks of {backbone.name}, got {how.blocks}; 0 trains everything"
        raise _error("blocks", fault)
    ranks = {path: min(sides) for path, sides in kernel_shapes(split_blocks(shapes, how.blocks)[0])}
    smallest = min(ranks, key=ranks.__getitem__)
    if how.lora_rank > ranks[smallest]:
        kernel = "/".join(map(str, smallest))
        fault = f"must be at most {ranks[smallest]}, the rank of {kernel} of {backbone.name}, got {how.lora_rank}"
        raise _error("lora_rank", fault)


def _error(name: str, fault: str) -> ConfigError:
    return ConfigError(f"fine_tune.{name} {fault}", field=f"fine_tune.{name}")


def state_shapes(backbone: Backbone, image_size: int) -> Tree:
    """Returns the shapes of a backbone's state, with its entries in the order in which images pass them."""
    order: list[str] = []

    def build() -> nnx.Module:
        network = backbone.build(ShapesOnly(0), image_size or backbone.image_size)
        order.extend(vars(network))  # networks assign their layers in this order; a state is sorted by name
        return network

    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build)))
    return {name: shapes[name] for name in order if name in shapes}


def split_blocks(state: State, blocks: int) -> tuple[Tree, Tree]:
    """Returns the last blocks with everything after them, and the rest of a state; 0 blocks: the whole and nothing.

    The state's entries must be in the order in which images pass them, as those of `state_shapes`.
    """
    if not blocks:
        return dict(state), {}
    order, listed = list(state), _blocks_name(state)
    first, position = len(state[listed]) - blocks, order.index(listed)
    last = {listed: {number: block for number, block in state[listed].items() if number >= first}}
    rest = {listed: {number: block for number, block in state[listed].items() if number < first}} if first else {}
    return (
        last | {name: state[name] for name in order[position + 1 :]},
        {name: state[name] for name in order[:position]} | rest,
    )


def _blocks_name(state: State) -> str:
    """Returns the name of the `nnx.List` of blocks: the entry with numbers as keys."""
    (name,) = (name for name, inner in state.items() if isinstance(inner, Mapping) and 0 in inner)
    return name


def create_parts(
    key: PRNGKeyArray, how: FineTune, backbone: Backbone, image_size: int, state: State
) -> tuple[Tree, Tree]:
    """Returns what training changes, as an entry "backbone" or "lora", and what it keeps, as an entry "backbone"."""
    if not how.keeps:
        return {"backbone": dict(state)}, {}
    last, rest = split_blocks({name: state[name] for name in state_shapes(backbone, image_size)}, how.blocks)
    if how.lora_rank:
        return {"lora": create_lora(key, last, how.lora_rank)}, {"backbone": dict(state)}
    return {"backbone": last}, {"backbone": rest} if rest else {}


def features_learn(params: State) -> bool:
    """Returns whether training changes the features: whether `params` contain more than the hash head."""
    return params.keys() != {"head"}


def backbone_state(params: State, frozen: State, scale: float) -> Tree:
    """Returns the state with which a backbone is trained; `scale` is α / rank of LoRA."""
    state = join_states(frozen.get("backbone", {}), params.get("backbone", {}))
    return apply_lora(state, params["lora"], scale) if "lora" in params else state


def merge_params(params: State, frozen: State, scale: float) -> tuple[State, State]:
    """Returns parameters for inference: the whole backbone in one of both trees, with LoRA's factors in its kernels."""
    if not (features_learn(params) and frozen):
        return params, frozen
    state = join_states(frozen["backbone"], params.get("backbone", {}))
    if "lora" in params:
        state = merge_lora(state, params["lora"], scale)
    return {"head": params["head"], "backbone": state}, {}


def join_states(first: State, second: State) -> Tree:
    """Returns the entries of two states that have no array in common."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(first) | traverse_util.flatten_dict(second))


def kernel_shapes(shapes: State) -> Iterator[tuple[tuple[Any, ...], tuple[int, int]]]:
    """Yields the path, the number of rows and that of columns of every kernel that LoRA applies to, in a fixed order.

    These are matrices [inputs, outputs] and convolutions [height, width, inputs, outputs]. Rows of a convolution are
    the pixels under it, channel by channel: A is a convolution to few channels and B a 1×1 convolution. Depthwise
    kernels have no inputs to mix and are left out.
    """
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        if path[-1] == "kernel" and (len(leaf.shape) == 2 or (len(leaf.shape) == 4 and leaf.shape[2] > 1)):
            yield path, (math.prod(leaf.shape[:-1]), leaf.shape[-1])


def create_lora(key: PRNGKeyArray, state: State, rank: int) -> Tree:
    """Returns factors "a" [rows, rank] and "b" [rank, columns] of every kernel, in a tree like the state.

    B is 0, so that training starts from the state itself; A is normal with deviation 1/√rows.
    """
    factors = {}
    for number, (path, (rows, columns)) in enumerate(kernel_shapes(state)):
        a = jax.random.normal(jax.random.fold_in(key, number), (rows, rank), jnp.float32) * rows**-0.5
        factors[path] = {"a": a, "b": jnp.zeros((rank, columns), jnp.float32)}
    return traverse_util.unflatten_dict(factors)


def apply_lora(state: State, factors: State, scale: float) -> Tree:
    """Returns the state with the kernels W + scale · A·B, for training: gradients reach the factors."""

    def add(kernel: Leaf, a: Leaf, b: Leaf) -> Array:
        # In full precision also on accelerators, so that training uses the same kernels as `merge_lora` returns.
        return jnp.asarray(kernel) + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(kernel.shape)

    return _map_kernels(add, state, factors)


def merge_lora(state: State, factors: State, scale: float) -> Tree:
    """Returns the state with the kernels W + scale · A·B, for inference: in float64 on the host, rounded to float32."""

    def add(kernel: Leaf, a: Leaf, b: Leaf) -> Array:
        product = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        return jnp.asarray((np.asarray(kernel, np.float64) + scale * product.reshape(kernel.shape)).astype(np.float32))

    return _map_kernels(add, state, factors)


def _map_kernels(function: Callable[[Leaf, Leaf, Leaf], Array], state: State, factors: State) -> Tree:
    pairs = traverse_util.flatten_dict(factors)
    leaves = traverse_util.flatten_dict(state)
    made = {p: function(x, pairs[*p, "a"], pairs[*p, "b"]) if (*p, "a") in pairs else x for p, x in leaves.items()}
    return traverse_util.unflatten_dict(made)


def checkpoint_blocks(network: nnx.Module) -> None:
    """Replaces each block of a network by one that keeps only its input and recomputes the rest for its gradient."""
    for name, blocks in list(vars(network).items()):
        if isinstance(blocks, nnx.List):
            setattr(network, name, nnx.List([_Checkpointed(block) for block in blocks]))


class _Checkpointed(nnx.Module):
    """A block that is called with one array."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, x: Array) -> Array:
        # `jax.checkpoint` differentiates with respect to its arguments only, so the state must be one of them.
        graph, state = nnx.split(self.block)
        return jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)
