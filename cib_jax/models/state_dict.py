"""A PyTorch state-dict's tensors: comparison with a network's shapes, and folding of batch norms into convolutions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]
Tree = dict[Any, Any]
"""Nested dicts of arrays, keyed by names and, for blocks, by numbers."""
NORM = ("weight", "bias", "running_mean", "running_var")  # tensors of a batch norm


class MismatchError(ValueError):
    """The tensors belong to another network: some are missing, unknown or of another shape."""


class NormedConvolution(NamedTuple):
    """A convolution without bias and the batch norm after it, by their names in the state-dict."""

    conv: str
    norm: str
    shape: Shape  # of PyTorch's weight: [outputs, inputs, height, width]

    @property
    def torch_shapes(self) -> dict[str, Shape]:
        """The names and shapes of the tensors of both."""
        return {f"{self.conv}.weight": self.shape} | {f"{self.norm}.{part}": self.shape[:1] for part in NORM}


def validate_shapes(tensors: Mapping[str, np.ndarray], needed: Mapping[str, Shape], extra: set[str]) -> None:
    """Raises `MismatchError` unless all `needed` tensors are there, in these shapes, and no others but `extra` ones."""
    present = {name: tensors[name] for name in needed if name in tensors}
    faults = {
        "missing": [name for name in needed if name not in tensors],
        "unknown": [name for name in tensors if name not in needed and name not in extra],
        "of another shape": [
            f"{name} {list(tensor.shape)} (needed {list(needed[name])})"
            for name, tensor in present.items()
            if tensor.shape != needed[name]
        ],
        "not of floats": [f"{name} ({tensor.dtype})" for name, tensor in present.items() if not _is_float(tensor)],
    }
    listed = [f"{fault}: {_first(names)}" for fault, names in faults.items() if names]
    if listed:
        raise MismatchError("; ".join(listed))


def fold_batch_norms(
    tensors: Mapping[str, np.ndarray], layers: Sequence[NormedConvolution], epsilon: float
) -> dict[str, Tree]:
    """Returns a `kernel` [height, width, inputs, outputs] and a `bias` [outputs], float32, for each convolution.

    A batch norm with fixed statistics scales and shifts each output, so it can become a part of the convolution. The
    result is computed in float64 and rounded once. `epsilon` is what the batch norms add to the variance.
    """
    folded = {}
    for layer in layers:
        weight = tensors[f"{layer.conv}.weight"].astype(np.float64)
        gain, offset, mean, variance = (tensors[f"{layer.norm}.{part}"].astype(np.float64) for part in NORM)
        scale = gain / np.sqrt(variance + epsilon)
        kernel = weight.transpose(2, 3, 1, 0) * scale
        folded[layer.conv] = {"kernel": as_float32(kernel), "bias": as_float32(offset - mean * scale)}
    return folded


def gather_blocks(folded: Mapping[str, Tree], blocks: Sequence[str], parts: Mapping[str, str]) -> Tree:
    """Returns the layers of each block; `parts` maps their names to those in the file, which some blocks lack."""
    return {
        i: {part: folded[f"{block}.{name}"] for part, name in parts.items() if f"{block}.{name}" in folded}
        for i, block in enumerate(blocks)
    }


def counters(layers: Sequence[NormedConvolution]) -> set[str]:
    """Returns the names of the batch norms' step counters, which PyTorch's files may contain."""
    return {f"{layer.norm}.num_batches_tracked" for layer in layers}


def as_float32(tensor: np.ndarray) -> np.ndarray:
    """Returns the tensor in float32, contiguous."""
    return np.ascontiguousarray(tensor, dtype=np.float32)


def _is_float(tensor: np.ndarray) -> bool:
    # NumPy itself does not count the extension type bfloat16 as a float.
    return np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"


def _first(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
