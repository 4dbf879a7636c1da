"""What of a backbone training changes: all of it, its last blocks, or low-rank corrections of their kernels."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from cib_jax.backbones import lora
from cib_jax.backbones.registry import Backbone
from cib_jax.errors import Refusal

Tree = dict[Any, Any]


class FineTuneError(Refusal):
    """A field of `FineTune` does not go with the network; the message names it and says what to do."""


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


def check(how: FineTune, backbone: Backbone, image_size: int, *, frozen: bool, from_scratch: bool) -> None:
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
            raise FineTuneError(f"fine_tune.{name}: {value} must be 0 or more")
        if name != "learning_rate" and value != int(value):
            raise FineTuneError(f"fine_tune.{name}: {value} must be a whole number")
    if not (math.isfinite(how.lora_alpha) and how.lora_alpha > 0):
        raise FineTuneError(f"fine_tune.lora_alpha: {how.lora_alpha} must be greater than 0")
    if not how.asked:
        return
    if frozen:
        name = how.asked[0]
        raise FineTuneError(
            f"fine_tune.{name}: {getattr(how, name)} is for a backbone that learns, and this one is frozen; set frozen "
            f"to False, or leave {name} at {getattr(FineTune(), name)}"
        )
    if from_scratch and how.keeps:
        name = "lora_rank" if how.lora_rank else "blocks"
        raise FineTuneError(
            f"fine_tune.{name}: {backbone.name} starts from random weights, most of which would stay as they are; set "
            "it to 0"
        )
    if how.keeps:
        shapes = outline(backbone, image_size)
        count = len(shapes[_list_of(shapes)])
        if how.blocks > count:
            raise FineTuneError(
                f"fine_tune.blocks: {how.blocks} is more than the {count} blocks of {backbone.name}; lower it, or 0 "
                "trains all of it"
            )
        sides = {path: min(sides) for path, sides in lora.kernels(split(shapes, how.blocks)[0])}
        narrow = min(sides, key=sides.__getitem__)
        if how.lora_rank > sides[narrow]:
            raise FineTuneError(
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
        return {"lora": lora.create(key, last, how.lora_rank)}, {"backbone": dict(state)}
    return {"backbone": last}, {"backbone": rest} if rest else {}


def features_learn(params: Tree) -> bool:
    """Returns whether training changes the features: `params` hold more than the hash head."""
    return params.keys() != {"head"}


def backbone_state(params: Tree, frozen: Tree, scale: float) -> Tree:
    """Returns the whole state of a backbone out of what learns and what does not; `scale`: of corrections."""
    state = _joined(frozen.get("backbone", {}), params.get("backbone", {}))
    return lora.corrected(state, params["lora"], scale) if "lora" in params else state


def settled(params: Tree, frozen: Tree, scale: float) -> tuple[Tree, Tree]:
    """Returns parameters for use, with the whole backbone in one of the two and no corrections beside it."""
    if not (features_learn(params) and frozen):
        return params, frozen
    state = _joined(frozen["backbone"], params.get("backbone", {}))
    if "lora" in params:
        state = lora.merged(state, params["lora"], scale)
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
