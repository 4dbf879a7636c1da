"""EfficientNet-Lite: EfficientNets (arXiv 1905.11946) without squeeze-and-excitation and with ReLU6 throughout.

Loading weights folds the batch norms into the convolutions, so a layer is a kernel and a bias.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.models import conv as conv_lib
from cib_jax.models import state_dict
from cib_jax.models.conv import Convolution
from cib_jax.models.state_dict import NormedConvolution, Shape, Tree

FEATURES = 1280
CLASSES = 1000
# The published files contain the ImageNet classifier too, which the features do not need.
CLASSIFIER: dict[str, Shape] = {"_fc.weight": (CLASSES, FEATURES), "_fc.bias": (CLASSES,)}
STEM = 32
EPSILON = 1e-3  # added to the variance by the batch norms
# (blocks, kernel side, stride of the first block, expansion, output channels) of each stage of Lite0
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Scaling(NamedTuple):
    """Factors by which a network has more channels and blocks in its stages than Lite0."""

    width: float
    depth: float

    def channels(self, count: int) -> int:
        """Returns the scaled number, rounded to a multiple of 8 but not down by more than a tenth."""
        scaled = count * self.width
        rounded = max(8, int(scaled + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * scaled else rounded


LITE0, LITE1, LITE2 = Scaling(1.0, 1.0), Scaling(1.0, 1.1), Scaling(1.1, 1.2)


class Row(NamedTuple):
    """One block: the side and stride of its depthwise kernel, the expansion and its channels."""

    kernel: int
    stride: int
    expansion: int
    inputs: int
    outputs: int

    @property
    def wide(self) -> int:
        """Number of channels between expansion and projection."""
        return self.inputs * self.expansion


def block_plan(scaling: Scaling) -> list[Row]:
    """Returns the blocks in order. In the Lite networks the first and the last stage keep their single block."""
    plan, inputs = [], STEM
    for stage, (blocks, kernel, stride, expansion, outputs) in enumerate(STAGES):
        for i in range(blocks if stage in (0, len(STAGES) - 1) else math.ceil(blocks * scaling.depth)):
            plan.append(Row(kernel, stride if i == 0 else 1, expansion, inputs, scaling.channels(outputs)))
            inputs = plan[-1].outputs
    return plan


class Block(nnx.Module):
    """An inverted bottleneck: 1×1 to more channels, depthwise, 1×1 to fewer; plus the input if shapes are equal."""

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
            y = jax.nn.relu6(conv_lib.pointwise(y, *self.expand.arrays))
        y = jax.nn.relu6(conv_lib.depthwise(y, *self.depthwise.arrays, stride=self.stride))
        y = conv_lib.pointwise(y, *self.project.arrays)
        return x + y if self.residual else y


class EfficientNetLite(nnx.Module):
    """The network up to the global average pool, with TensorFlow's padding; any size from 32 pixels up works.

    Stem and head have the same number of channels at every scaling.
    """

    def __init__(self, rngs: nnx.Rngs, scaling: Scaling = LITE0):
        plan = block_plan(scaling)
        self.stem = Convolution(rngs, 3, 3, 3, STEM)
        self.blocks = nnx.List([Block(rngs, row) for row in plan])
        self.head = Convolution(rngs, 1, 1, plan[-1].outputs, FEATURES)

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch 1280"]:
        """Returns means over the last map, taken in float32, in the dtype of images and parameters."""
        return conv_lib.in_chunks(self._features, images)

    def _features(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch 1280"]:
        x = jax.nn.relu6(conv_lib.conv(images, *self.stem.arrays, stride=2))
        x = jax.nn.relu6(conv_lib.pointwise(conv_lib.in_turn(self.blocks, x), *self.head.arrays))
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)


def torch_shapes(scaling: Scaling = LITE0) -> dict[str, Shape]:
    """Returns the name and shape of every tensor that the published PyTorch checkpoint must hold."""
    return {name: shape for layer in _layers(scaling) for name, shape in layer.torch_shapes.items()} | CLASSIFIER


def convert(tensors: Mapping[str, np.ndarray], scaling: Scaling = LITE0) -> Tree:
    """Returns the state of `EfficientNetLite` from tensors in the names of the `efficientnet-lite-pytorch` package."""
    layers = _layers(scaling)
    state_dict.validate_shapes(tensors, torch_shapes(scaling), state_dict.counters(layers))
    folded = state_dict.fold_batch_norms(tensors, layers, EPSILON)
    parts = {"expand": "_expand_conv", "depthwise": "_depthwise_conv", "project": "_project_conv"}
    names = [f"_blocks.{i}" for i in range(len(block_plan(scaling)))]
    blocks = state_dict.gather_blocks(folded, names, parts)
    return {"stem": folded["_conv_stem"], "blocks": blocks, "head": folded["_conv_head"]}


def _layers(scaling: Scaling) -> list[NormedConvolution]:
    layers = [NormedConvolution("_conv_stem", "_bn0", (STEM, 3, 3, 3))]
    plan = block_plan(scaling)
    for i, row in enumerate(plan):
        block = f"_blocks.{i}"
        if row.expansion > 1:
            layers.append(NormedConvolution(f"{block}._expand_conv", f"{block}._bn0", (row.wide, row.inputs, 1, 1)))
        layers += [
            NormedConvolution(f"{block}._depthwise_conv", f"{block}._bn1", (row.wide, 1, row.kernel, row.kernel)),
            NormedConvolution(f"{block}._project_conv", f"{block}._bn2", (row.outputs, row.wide, 1, 1)),
        ]
    return [*layers, NormedConvolution("_conv_head", "_bn1", (FEATURES, plan[-1].outputs, 1, 1))]
