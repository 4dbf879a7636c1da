"""ResNet-50 (arXiv 1512.03385) in torchvision's version 1.5, in which the 3×3 kernel of a bottleneck has the stride.

Loading weights folds the batch norms into the convolutions, so a layer is a kernel and a bias.
"""

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

FEATURES = 2048
STEM = 64
WIDENING = 4  # output channels of a bottleneck / channels of its 3×3 kernel
# (blocks, channels of the 3×3 kernels, stride of the first block) of each stage
STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
EPSILON = 1e-5  # added to the variance by the batch norms
PADDING = ((1, 1), (1, 1))
STEM_PADDING = ((3, 3), (3, 3))


class Row(NamedTuple):
    """One bottleneck: its name in the checkpoint, its stride and its channels."""

    name: str
    stride: int
    inputs: int
    narrow: int

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        return self.narrow * WIDENING

    @property
    def projects(self) -> bool:
        """Whether the input needs a projection to the shape of the output before both are added."""
        return self.stride > 1 or self.inputs != self.outputs


def block_plan() -> list[Row]:
    """Returns the 16 bottlenecks in order."""
    plan, inputs = [], STEM
    for stage, (blocks, narrow, stride) in enumerate(STAGES, start=1):
        for i in range(blocks):
            plan.append(Row(f"layer{stage}.{i}", stride if i == 0 else 1, inputs, narrow))
            inputs = plan[-1].outputs
    return plan


class Bottleneck(nnx.Module):
    """A 1×1 convolution to fewer channels, a 3×3 and a 1×1 convolution, added to the (projected) input."""

    def __init__(self, rngs: nnx.Rngs, row: Row):
        self.reduce = Convolution(rngs, 1, 1, row.inputs, row.narrow)
        self.filter = Convolution(rngs, 3, 3, row.narrow, row.narrow)
        self.widen = Convolution(rngs, 1, 1, row.narrow, row.outputs)
        self.shortcut = Convolution(rngs, 1, 1, row.inputs, row.outputs) if row.projects else None
        self.stride = row.stride

    def __call__(self, x: Float[Array, "batch h w inputs"]) -> Float[Array, "batch h2 w2 outputs"]:
        """Applies the block."""
        y = jax.nn.relu(conv_lib.pointwise(x, *self.reduce.arrays))
        y = jax.nn.relu(conv_lib.conv(y, *self.filter.arrays, stride=self.stride, padding=PADDING))
        y = conv_lib.pointwise(y, *self.widen.arrays)
        if self.shortcut is not None:
            x = conv_lib.pointwise(x[:, :: self.stride, :: self.stride], *self.shortcut.arrays)
        return jax.nn.relu(x + y)


class ResNet50(nnx.Module):
    """The network up to the global average pool; any size from 32 up works."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = Convolution(rngs, 7, 7, 3, STEM)
        self.blocks = nnx.List([Bottleneck(rngs, row) for row in block_plan()])

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch features"]:
        """Returns means over the last map, taken in float32, in the dtype of images and parameters."""
        last = len(self.blocks) - STAGES[-1][0]

        def first_stages(images: Array) -> Float[Array, "batch h2 w2 channels"]:
            x = jax.nn.relu(conv_lib.conv(images, *self.stem.arrays, stride=2, padding=STEM_PADDING))
            return conv_lib.in_turn(self.blocks[:last], conv_lib.max_pool_3x3(x))

        # The last stage's weights are larger than its maps. Chunks would read them from memory again and again, so this
        # stage takes the whole batch.
        x = conv_lib.in_turn(self.blocks[last:], conv_lib.in_chunks(first_stages, images))
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)


def torch_shapes() -> dict[str, Shape]:
    """Returns the name and shape of every tensor that the features need, in torchvision's names, which timm shares."""
    return {name: shape for layer in _layers() for name, shape in layer.torch_shapes.items()}


def convert(tensors: Mapping[str, np.ndarray]) -> Tree:
    """Returns the state of `ResNet50` from torchvision's or timm's tensors, with batch norms folded in."""
    layers = _layers()
    state_dict.validate_shapes(tensors, torch_shapes(), state_dict.counters(layers) | {"fc.weight", "fc.bias"})
    folded = state_dict.fold_batch_norms(tensors, layers, EPSILON)
    parts = {"reduce": "conv1", "filter": "conv2", "widen": "conv3", "shortcut": "downsample.0"}
    return {
        "stem": folded["conv1"],
        "blocks": state_dict.gather_blocks(folded, [row.name for row in block_plan()], parts),
    }


def _layers() -> list[NormedConvolution]:
    layers = [NormedConvolution("conv1", "bn1", (STEM, 3, 7, 7))]
    for row in block_plan():
        shapes = ((row.narrow, row.inputs, 1, 1), (row.narrow, row.narrow, 3, 3), (row.outputs, row.narrow, 1, 1))
        layers += [NormedConvolution(f"{row.name}.conv{i}", f"{row.name}.bn{i}", s) for i, s in enumerate(shapes, 1)]
        if row.projects:
            name = f"{row.name}.downsample"
            layers.append(NormedConvolution(f"{name}.0", f"{name}.1", (row.outputs, row.inputs, 1, 1)))
    return layers
