"""EfficientNet-Lite0: the small network without squeeze-and-excitation, ReLU6 throughout (arXiv 1905.11946).

Loading weights folds the frozen batch norms into the convolutions, so a layer is a kernel and a bias.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.backbones import convolution
from cib_jax.backbones.convolution import Convolution
from cib_jax.backbones.tensors import Shape, Tree, check

FEATURES = 1280
CLASSES = 1000
STEM = 32
EPSILON = 1e-3  # of the batch norms
# Of each stage: blocks, kernel, stride of the first block, expansion, channels out.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Row(NamedTuple):
    """One block: the side and stride of its depthwise kernel, and its channels."""

    kernel: int
    stride: int
    expansion: int
    inputs: int
    outputs: int

    @property
    def wide(self) -> int:
        """The channels between expansion and projection."""
        return self.inputs * self.expansion


def block_plan() -> list[Row]:
    """Returns the 16 blocks in order."""
    plan, inputs = [], STEM
    for blocks, kernel, stride, expansion, outputs in STAGES:
        for i in range(blocks):
            plan.append(Row(kernel, stride if i == 0 else 1, expansion, inputs, outputs))
            inputs = outputs
    return plan


class Block(nnx.Module):
    """An inverted bottleneck: widen, filter each channel, narrow; add the input where its shape allows it."""

    def __init__(self, rngs: nnx.Rngs, row: Row):
        self.expand = Convolution(rngs, 1, 1, row.inputs, row.wide) if row.expansion > 1 else None
        self.depthwise = Convolution(rngs, row.kernel, row.kernel, 1, row.wide)
        self.project = Convolution(rngs, 1, 1, row.wide, row.outputs)
        self.stride = row.stride
        self.residual = row.stride == 1 and row.inputs == row.outputs

    def __call__(self, x: Float[Array, "batch h w inputs"]) -> Float[Array, "batch h2 w2 outputs"]:
        """Applies the block."""
        y = x
        if self.expand is not None:
            y = jax.nn.relu6(convolution.pointwise(y, *self.expand.arrays))
        y = jax.nn.relu6(convolution.depthwise(y, *self.depthwise.arrays, stride=self.stride))
        y = convolution.pointwise(y, *self.project.arrays)
        return x + y if self.residual else y


class EfficientNetLite0(nnx.Module):
    """The network up to the global average pool; it pads as TensorFlow does and takes any size from 32 up."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = Convolution(rngs, 3, 3, 3, STEM)
        self.blocks = nnx.List([Block(rngs, row) for row in block_plan()])
        self.head = Convolution(rngs, 1, 1, STAGES[-1][-1], FEATURES)

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch 1280"]:
        """Returns the features of normalised images (pixels in [0, 1], mean 0.5, deviation 0.5).

        They are of the images' dtype, if the parameters have it too; the average is taken in float32.
        """
        return convolution.in_chunks(self._features, images)

    def _features(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch 1280"]:
        x = jax.nn.relu6(convolution.conv(images, *self.stem.arrays, stride=2))
        for block in self.blocks:
            x = block(x)
        x = jax.nn.relu6(convolution.pointwise(x, *self.head.arrays))
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)


def class_logits(
    features: Float[Array, "batch 1280"], classifier: Mapping[str, Array | np.ndarray]
) -> Float[Array, "batch 1000"]:
    """Returns the logits of the 1,000 ImageNet classes; `classifier` comes from `convert_classifier`."""
    return features @ classifier["kernel"] + classifier["bias"]


def torch_shapes() -> dict[str, Shape]:
    """Returns the name and shape of every tensor that the published PyTorch checkpoint must hold."""
    shapes: dict[str, Shape] = {}
    for conv, norm, shape in _layers():
        shapes[f"{conv}.weight"] = shape
        shapes |= {f"{norm}.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {"_fc.weight": (CLASSES, FEATURES), "_fc.bias": (CLASSES,)}


def convert(tensors: Mapping[str, np.ndarray]) -> Tree:
    """Returns the state of `EfficientNetLite0` from a PyTorch checkpoint's tensors, batch norms folded in.

    Names are those of the `efficientnet-lite-pytorch` package.

    Raises:
        MismatchError: if tensors are missing, unknown or of another shape.
    """
    counters = {f"{norm}.num_batches_tracked" for _, norm, _ in _layers()}
    check(tensors, torch_shapes(), counters)
    blocks: dict[int, Tree] = {}
    for i, row in enumerate(block_plan()):
        own = f"_blocks.{i}"
        blocks[i] = {"expand": _fold(tensors, f"{own}._expand_conv", f"{own}._bn0")} if row.expansion > 1 else {}
        blocks[i]["depthwise"] = _fold(tensors, f"{own}._depthwise_conv", f"{own}._bn1")
        blocks[i]["project"] = _fold(tensors, f"{own}._project_conv", f"{own}._bn2")
    stem, head = _fold(tensors, "_conv_stem", "_bn0"), _fold(tensors, "_conv_head", "_bn1")
    return {"stem": stem, "blocks": blocks, "head": head}


def convert_classifier(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the checkpoint's ImageNet classifier: `kernel` [1280, 1000] and `bias` [1000]."""
    check({n: t for n, t in tensors.items() if n.startswith("_fc.")}, _classifier_shapes(), set())
    return {
        "kernel": np.ascontiguousarray(tensors["_fc.weight"].T, dtype=np.float32),
        "bias": np.asarray(tensors["_fc.bias"], dtype=np.float32),
    }


def _layers() -> list[tuple[str, str, Shape]]:
    """The checkpoint's convolutions: name, batch norm, and shape of the weight [outputs, inputs, kh, kw]."""
    layers: list[tuple[str, str, Shape]] = [("_conv_stem", "_bn0", (STEM, 3, 3, 3))]
    for i, row in enumerate(block_plan()):
        own = f"_blocks.{i}"
        if row.expansion > 1:
            layers.append((f"{own}._expand_conv", f"{own}._bn0", (row.wide, row.inputs, 1, 1)))
        layers.append((f"{own}._depthwise_conv", f"{own}._bn1", (row.wide, 1, row.kernel, row.kernel)))
        layers.append((f"{own}._project_conv", f"{own}._bn2", (row.outputs, row.wide, 1, 1)))
    return [*layers, ("_conv_head", "_bn1", (FEATURES, STAGES[-1][-1], 1, 1))]


def _classifier_shapes() -> dict[str, Shape]:
    return {name: shape for name, shape in torch_shapes().items() if name.startswith("_fc.")}


def _fold(tensors: Mapping[str, np.ndarray], conv: str, norm: str) -> Tree:
    """The convolution and its batch norm as one layer; in float64, so that the folding rounds only once."""
    weight = tensors[f"{conv}.weight"].astype(np.float64)
    gain, offset, mean, variance = (
        tensors[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / np.sqrt(variance + EPSILON)
    kernel = weight.transpose(2, 3, 1, 0) * scale
    return {"kernel": kernel.astype(np.float32), "bias": (offset - mean * scale).astype(np.float32)}
