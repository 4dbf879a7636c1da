"""A convolution and the frozen batch norm after it, as one layer: a kernel and a bias."""

from collections.abc import Mapping

import numpy as np

from cib_jax.backbones.tensors import Shape, Tree


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
