"""Low-rank corrections of kernels (LoRA, https://arxiv.org/abs/2106.09685): a kernel stays, two thin factors learn."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from cib_jax.errors import ConfigError
from cib_jax.models.registry import Backbone

# backbones.lora: Low-rank corrections of kernels (LoRA, https://arxiv.org/abs/2106.09685): a kernel stays, two thin factors learn.

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


# backbones.fine_tuning: What of a backbone training changes: all of it, its last blocks, or low-rank corrections of their kernels.


@dataclasses.dataclass(frozen=True)
class FineTune:
    """How a backbone that is not frozen learns; the fields of the config's group of this name.

    Examples:
      >>> import cib_jax as cib
      >>> cib.FineTune(blocks=3, learning_rate=1e-4).asked
      ('blocks', 'learning_rate')
    """

    blocks: int = 0
    """The last blocks, which learn with all that comes after them; what comes before stays. 0: all learns."""
    learning_rate: float = 0.0
    """Of what learns of the backbone; 0: that of the head."""
    checkpointing: bool = False
    """Whether a block is computed again for its gradient instead of being kept: less memory, more time."""
    lora_rank: int = 0
    """Of the corrections that learn in place of the weights, which stay; 0: the weights learn themselves."""
    lora_alpha: float = 8.0
    """α, by whose ratio to the rank corrections are scaled."""

    @property
    def asked(self) -> tuple[str, ...]:
        """The fields that ask for something."""
        return tuple(name for name in ("blocks", "learning_rate", "checkpointing", "lora_rank") if getattr(self, name))

    @property
    def keeps(self) -> bool:
        """Whether weights stay as they are loaded, though the backbone learns."""
        return bool(self.blocks or self.lora_rank)


def validate_fine_tune(how: FineTune, backbone: Backbone, image_size: int, *, frozen: bool, from_scratch: bool) -> None:
    """Checks that a network can be trained so.

    Args:
      how: it shall be.
      backbone: the network, which takes images.
      image_size: side of its input in pixels; 0: its usual one.
      frozen: whether nothing of it shall learn.
      from_scratch: whether its weights are random.

    Raises:
      FineTuneError: it cannot.
    """
    for name in ("blocks", "learning_rate", "lora_rank"):
        value = getattr(how, name)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"fine_tune.{name}: {value} must be 0 or more")
        if name != "learning_rate" and value != int(value):
            raise ConfigError(f"fine_tune.{name}: {value} must be a whole number")
    if not (math.isfinite(how.lora_alpha) and how.lora_alpha > 0):
        raise ConfigError(f"fine_tune.lora_alpha: {how.lora_alpha} must be greater than 0")
    if not how.asked:
        return
    if frozen:
        name = how.asked[0]
        raise ConfigError(
            f"fine_tune.{name}: {getattr(how, name)} is for a backbone that learns, and this one is frozen; set frozen "
            f"to False, or leave {name} at {getattr(FineTune(), name)}"
        )
    if from_scratch and how.keeps:
        name = "lora_rank" if how.lora_rank else "blocks"
        raise ConfigError(
            f"fine_tune.{name}: {backbone.name} starts from random weights, most of which would stay as they are; set "
            "it to 0"
        )
    if how.keeps:
        shapes = outline(backbone, image_size)
        count = len(shapes[_list_of(shapes)])
        if how.blocks > count:
            raise ConfigError(
                f"fine_tune.blocks: {how.blocks} is more than the {count} blocks of {backbone.name}; lower it, or 0 "
                "trains all of it"
            )
        sides = {path: min(sides) for path, sides in kernels(split(shapes, how.blocks)[0])}
        narrow = min(sides, key=sides.__getitem__)
        if how.lora_rank > sides[narrow]:
            raise ConfigError(
                f"fine_tune.lora_rank: {how.lora_rank} is more than the {sides[narrow]} that {narrow} of "
                f"{backbone.name} can have; lower it"
            )


def outline(backbone: Backbone, image_size: int) -> dict[str, Any]:
    """Returns the shapes of a backbone's state; its entries from input to output, as its `__init__` makes them."""
    order: list[str] = []

    def build() -> nnx.Module:
        network = backbone.build(nnx.Rngs(0), image_size or backbone.image_size)
        order.extend(vars(network))
        return network

    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build)))
    return {name: shapes[name] for name in order if name in shapes}


def split(state: Mapping[Any, Any], blocks: int) -> tuple[Tree, Tree]:
    """Returns the last `blocks` (0: all) of a state with what comes after them, and the rest.

    Args:
      state: whose entries lie in the order from input to output, one of them the blocks, by number.
      blocks: how many.
    """
    if not blocks:
        return dict(state), {}
    order, listed = list(state), _list_of(state)
    first = len(state[listed]) - blocks
    place = order.index(listed)
    last = {listed: {number: block for number, block in state[listed].items() if number >= first}}
    rest = {listed: {number: block for number, block in state[listed].items() if number < first}} if first else {}
    before = {name: state[name] for name in order[:place]}
    return last | {name: state[name] for name in order[place + 1 :]}, before | rest


def _list_of(state: Mapping[Any, Any]) -> str:
    """Returns the name of the entry whose own entries are numbered: an `nnx.List` of blocks."""
    (name,) = (name for name, inner in state.items() if isinstance(inner, Mapping) and 0 in inner)
    return name


def create_parts(
    key: PRNGKeyArray, how: FineTune, backbone: Backbone, image_size: int, state: Mapping[Any, Any]
) -> tuple[Tree, Tree]:
    """Returns what training changes and what it leaves alone, as entries "backbone" or "lora" beside the head's.

    Args:
      key: for corrections.
      how: it learns.
      backbone: the network.
      image_size: side of its input in pixels.
      state: of the whole network.
    """
    if not how.keeps:
        return {"backbone": dict(state)}, {}
    last, rest = split({name: state[name] for name in outline(backbone, image_size)}, how.blocks)
    if how.lora_rank:
        return {"lora": create(key, last, how.lora_rank)}, {"backbone": dict(state)}
    return {"backbone": last}, {"backbone": rest} if rest else {}


def features_learn(params: Tree) -> bool:
    """Returns whether training changes the features: `params` hold more than the hash head."""
    return params.keys() != {"head"}


def backbone_state(params: Tree, frozen: Tree, scale: float) -> Tree:
    """Returns the whole state of a backbone out of what learns and what does not; `scale`: of corrections."""
    state = _joined(frozen.get("backbone", {}), params.get("backbone", {}))
    return corrected(state, params["lora"], scale) if "lora" in params else state


def settled(params: Tree, frozen: Tree, scale: float) -> tuple[Tree, Tree]:
    """Returns parameters for use, with the whole backbone in one of the two and no corrections beside it."""
    if not (features_learn(params) and frozen):
        return params, frozen
    state = _joined(frozen["backbone"], params.get("backbone", {}))
    if "lora" in params:
        state = merged(state, params["lora"], scale)
    return {"head": params["head"], "backbone": state}, {}


def _joined(one: Tree, other: Tree) -> Tree:
    made = dict(one)
    for name, inner in other.items():
        made[name] = _joined(made[name], inner) if name in made else inner
    return made


def checkpoint_blocks(network: nnx.Module) -> None:
    """Has the gradient of each block of a network compute anew what the block made, instead of keeping it."""
    for name, blocks in list(vars(network).items()):
        if isinstance(blocks, nnx.List):
            setattr(network, name, nnx.List([_Checkpointed(block) for block in blocks]))


class _Checkpointed(nnx.Module):
    """A block that is called with one array."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, x: Array) -> Array:
        graph, state = nnx.split(self.block)
        return jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)
