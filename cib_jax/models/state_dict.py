"""A checkpoint's named tensors, held against what a network needs."""

from collections.abc import Mapping

import numpy as np

# backbones.tensors: A checkpoint's named tensors, held against what a network needs.

Shape = tuple[int, ...]
Tree = dict  # nested: names to trees or float32 arrays


class MismatchError(ValueError):
    """The tensors are not this network's: some are missing, unknown or of another shape."""


def validate_shapes(
    tensors: Mapping[str, np.ndarray], needed: Mapping[str, Shape], extra: frozenset[str] | set[str]
) -> None:
    """Raises MismatchError unless all that is `needed` is there, in its shape, and else only `extra`."""
    faults = _list("missing", [name for name in needed if name not in tensors])
    faults += _list("unknown", [name for name in tensors if name not in needed and name not in extra])
    present = {name: tensors[name] for name in needed if name in tensors}
    faults += _list(
        "of another shape",
        [f"{n} {list(t.shape)} (needed {list(needed[n])})" for n, t in present.items() if t.shape != needed[n]],
    )
    faults += _list("not of floats", [f"{n} ({t.dtype})" for n, t in present.items() if not is_float(t)])
    if faults:
        raise MismatchError("; ".join(faults))


def is_float(tensor: np.ndarray) -> bool:
    """Returns whether the dtype is a float, bfloat16 included (which NumPy itself does not count as one)."""
    return np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"


def _list(fault: str, names: list[str], shown: int = 3) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return [f"{fault}: {', '.join(names[:shown])}{more}"]


# backbones.folding: A convolution and the frozen batch norm after it, as one layer: a kernel and a bias.


def torch_shapes(conv: str, norm: str, shape: Shape) -> dict[str, Shape]:
    """Returns the names and shapes of PyTorch's tensors for both; `shape` is [outputs, inputs, kh, kw]."""
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{conv}.weight": shape} | {f"{norm}.{part}": shape[:1] for part in parts}


def fold(tensors: Mapping[str, np.ndarray], conv: str, norm: str, epsilon: float) -> Tree:
    """Returns the layer's `kernel` [kh, kw, inputs, outputs] and `bias` [outputs], float32.

    Computed in float64, so that the folding rounds only once. `epsilon` is what the norm adds to the variance.
    """
    weight = tensors[f"{conv}.weight"].astype(np.float64)
    gain, offset, mean, variance = (
        tensors[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / np.sqrt(variance + epsilon)
    kernel = weight.transpose(2, 3, 1, 0) * scale
    return {"kernel": kernel.astype(np.float32), "bias": (offset - mean * scale).astype(np.float32)}
