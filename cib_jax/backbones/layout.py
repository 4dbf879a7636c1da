"""Where the parameters of a vision transformer lie in a published file: names, shapes and how they become ours."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cib_jax.backbones.tensors import Shape, Tree, check
from cib_jax.backbones.transformer import Design


class Part(NamedTuple):
    """The tensor of one parameter: its name and shape in the file, and how the parameter comes from it."""

    name: str
    shape: Shape
    taken: Callable[[np.ndarray], np.ndarray] = np.asarray


Layout = dict[Any, Any]
"""A network's state with a `Part` in place of each array."""


def fill(layout: Layout, tensors: Mapping[str, np.ndarray], extra: set[str]) -> Tree:
    """Returns the state whose arrays lie in `tensors` as the layout says, in float32.

    Args:
        layout: of the network.
        tensors: of a file, by name.
        extra: names in the file that the network does without.

    Raises:
        MismatchError: if tensors are missing, unknown or of another shape.
    """
    check(tensors, shapes(layout), extra)
    return _filled(layout, tensors)


def shapes(layout: Layout) -> dict[str, Shape]:
    """Returns the name and shape of every tensor that the network needs."""
    found: dict[str, Shape] = {}
    for part in layout.values():
        found |= {part.name: part.shape} if isinstance(part, Part) else shapes(part)
    return found


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Layout:
    """Returns where a linear layer lies; PyTorch keeps its kernel as [outputs, inputs]."""
    kernel: Layout = {"kernel": Part(f"{name}.weight", (outputs, inputs), np.transpose)}
    return kernel | ({"bias": Part(f"{name}.bias", (outputs,))} if bias else {})


def norm(name: str, width: int) -> Layout:
    """Returns where a layer norm lies."""
    return {"scale": Part(f"{name}.weight", (width,)), "bias": Part(f"{name}.bias", (width,))}


def patches(name: str, design: Design) -> Layout:
    """Returns where the layer of the patches lies; in PyTorch it is a convolution."""

    def as_matrix(kernel: np.ndarray) -> np.ndarray:
        return kernel.transpose(2, 3, 1, 0).reshape(-1, design.width)

    kernel: Layout = {"kernel": Part(f"{name}.weight", (design.width, 3, design.patch, design.patch), as_matrix)}
    return kernel | ({"bias": Part(f"{name}.bias", (design.width,))} if design.patch_bias else {})


def clip_block(name: str, design: Design) -> Layout:
    """Returns where a block lies in the names that CLIP and SigLIP share."""
    width = design.width
    attention = {
        ours: linear(f"{name}.self_attn.{theirs}", width, width)
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj"))
    }
    return {
        "norm1": norm(f"{name}.layer_norm1", width),
        "attention": attention,
        "norm2": norm(f"{name}.layer_norm2", width),
        "mlp": mlp(f"{name}.mlp", design),
    }


def mlp(name: str, design: Design) -> Layout:
    """Returns where an MLP lies."""
    return {
        "hidden": linear(f"{name}.fc1", design.width, design.hidden),
        "out": linear(f"{name}.fc2", design.hidden, design.width),
    }


def _filled(layout: Layout, tensors: Mapping[str, np.ndarray]) -> Tree:
    return {
        key: np.ascontiguousarray(part.taken(tensors[part.name]), dtype=np.float32)
        if isinstance(part, Part)
        else _filled(part, tensors)
        for key, part in layout.items()
    }
