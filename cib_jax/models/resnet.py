"""ResNet-50 as torchvision has it, "version 1.5": a bottleneck's stride is in its 3×3 kernel (arXiv 1512.03385).

Loading weights folds the frozen batch norms into the convolutions, so a layer is a kernel and a bias."""

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
from cib_jax.models.state_dict import Shape, Tree, validate_shapes

FEATURES = 2048
STEM = 64
WIDENING = 4  # a bottleneck gives this many times the channels that its 3×3 kernel has
# Of each stage: blocks, channels of the 3×3 kernels, stride of the first block.
STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
EPSILON = 1e-5  # of the batch norms
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
        """The channels that it gives."""
        return self.narrow * WIDENING

    @property
    def projects(self) -> bool:
        """Whether its input must be brought to the shape of its output, to be added to it."""
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
    """Narrow, filter, widen, and add the input, which the first block of a stage projects to its shape."""

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

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch 2048"]:
        """Returns the features of normalized images, means over the last map.

        They are of the images' dtype, if the parameters have it too; the average is taken in float32.
        """
        # The last stage's weights are larger than its maps, so it takes the whole batch.
        last = len(self.blocks) - STAGES[-1][0]
        x = conv_lib.in_chunks(lambda images: self._through(self._stem(images), 0, last), images)
        x = self._through(x, last, len(self.blocks))
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)

    def _stem(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch h2 w2 64"]:
        x = jax.nn.relu(conv_lib.conv(images, *self.stem.arrays, stride=2, padding=STEM_PADDING))
        return conv_lib.max_pool_3x3(x)

    def _through(
        self, x: Float[Array, "batch h w inputs"], first: int, end: int
    ) -> Float[Array, "batch h2 w2 outputs"]:
        for i in range(first, end):
            x = self.blocks[i](x)
        return x


def torch_shapes() -> dict[str, Shape]:
    """Returns the name and shape of every tensor that the features need, in torchvision's names, which are timm's."""
    shapes: dict[str, Shape] = {}
    for layer in _layers():
        shapes |= state_dict.torch_shapes(*layer)
    return shapes


def convert(tensors: Mapping[str, np.ndarray]) -> Tree:
    """Returns the state of `ResNet50` from torchvision's or timm's tensors, batch norms folded in.

    Raises:
        MismatchError: if tensors are missing, unknown or of another shape.
    """
    layers = _layers()
    counters = {f"{norm}.num_batches_tracked" for _, norm, _ in layers}
    validate_shapes(tensors, torch_shapes(), counters | {"fc.weight", "fc.bias"})
    folded = {conv: state_dict.fold(tensors, conv, norm, EPSILON) for conv, norm, _ in layers}
    parts = {"reduce": "conv1", "filter": "conv2", "widen": "conv3", "shortcut": "downsample.0"}
    blocks = {
        i: {part: folded[f"{row.name}.{name}"] for part, name in parts.items() if f"{row.name}.{name}" in folded}
        for i, row in enumerate(block_plan())
    }
    return {"stem": folded["conv1"], "blocks": blocks}


def _layers() -> list[tuple[str, str, Shape]]:
    """The checkpoint's convolutions: name, batch norm, and shape of the weight [outputs, inputs, kh, kw]."""
    layers: list[tuple[str, str, Shape]] = [("conv1", "bn1", (STEM, 3, 7, 7))]
    for row in block_plan():
        layers.append((f"{row.name}.conv1", f"{row.name}.bn1", (row.narrow, row.inputs, 1, 1)))
        layers.append((f"{row.name}.conv2", f"{row.name}.bn2", (row.narrow, row.narrow, 3, 3)))
        layers.append((f"{row.name}.conv3", f"{row.name}.bn3", (row.outputs, row.narrow, 1, 1)))
        if row.projects:
            layers.append((f"{row.name}.downsample.0", f"{row.name}.downsample.1", (row.outputs, row.inputs, 1, 1)))
    return layers
