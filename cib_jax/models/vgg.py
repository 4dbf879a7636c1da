"""VGG-16 (arXiv 1409.1556, column D) up to the layer fc7, which gives the features of CIBHash's published results."""

import functools
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.models import conv
from cib_jax.models.conv import Convolution
from cib_jax.models.state_dict import Shape, Tree, as_float32, validate_shapes

FEATURES = 4096
GRID = 7  # side of the map that fc6 takes
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels; a pool after each
PADDING = ((1, 1), (1, 1))
LANES = 128  # channels of a TPU


class Layer(Convolution):
    """A 3×3 convolution and a ReLU, followed by a pool in the last layer of a stage."""

    def __init__(self, rngs: nnx.Rngs, inputs: int, outputs: int, pools: bool):
        super().__init__(rngs, 3, 3, inputs, outputs)
        self.pools = pools

    def __call__(self, x: Float[Array, "batch h w inputs"]) -> Float[Array, "batch h2 w2 outputs"]:
        """Applies the layer."""
        x = jax.nn.relu(conv.conv(x, *self.arrays, padding=PADDING))
        return conv.max_pool_2x2(x) if self.pools else x


class VGG16(nnx.Module):
    """The 13 convolutions, fc6 and fc7, without dropout; any size from 32 up works."""

    def __init__(self, rngs: nnx.Rngs):
        self.convolutions = nnx.List([Layer(rngs, i, o, pools) for i, o, pools in _layers()])
        self.fc6 = Convolution(rngs, GRID * GRID * STAGES[-1][-1], FEATURES)
        self.fc7 = Convolution(rngs, FEATURES, FEATURES)

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch features"]:
        """Returns fc7 of normalized images, after its ReLU, in their dtype (the parameters must have the same)."""
        # The last stage's weights are larger than its maps. Chunks would read them from memory again and again, so this
        # stage takes the whole batch.
        last = len(self.convolutions) - len(STAGES[-1])
        x = conv.in_chunks(self._first_stages, images)
        x = adaptive_average_pool(conv.in_turn(self.convolutions[last:], x), GRID)
        for layer in (self.fc6, self.fc7):
            kernel, bias = layer.arrays
            x = jax.nn.relu(x.reshape(x.shape[0], -1) @ kernel + bias[None])
        return x

    def _first_stages(self, x: Float[Array, "batch h w 3"]) -> Float[Array, "batch h2 w2 channels"]:
        last = len(self.convolutions) - len(STAGES[-1])
        narrow = sum(layer.arrays[0].shape[2] < LANES for layer in self.convolutions[:last])
        plain = functools.partial(conv.in_turn, self.convolutions[:narrow])
        if len(x) % 2:
            x = plain(x)
        else:
            by_pairs = functools.partial(in_pairs, self.convolutions[:narrow])
            x = jax.lax.platform_dependent(x, tpu=by_pairs, default=plain)
        return conv.in_turn(self.convolutions[narrow:last], x)


def in_pairs(layers: Sequence[Layer], x: Float[Array, "batch h w inputs"]) -> Float[Array, "batch h2 w2 outputs"]:
    """Applies layers to an even number of images, two of which are channels of one.

    TPUs pad channels to 128, in their memory and in products. Twice as many channels fill these, and take less time
    although half of the factors of the products are 0.
    """
    x = jnp.concatenate(jnp.split(x, 2), axis=-1)
    for layer in layers:
        kernel, bias = layer.arrays
        x = conv.conv_plain(x, jnp.kron(jnp.eye(2, dtype=kernel.dtype), kernel), 1, PADDING)
        x = jax.nn.relu(x + jnp.concatenate((bias, bias)).reshape(1, 1, 1, -1))
        x = conv.max_pool_plain(x) if layer.pools else x
    return jnp.concatenate(jnp.split(x, 2, axis=-1))


def adaptive_average_pool(x: Float[Array, "batch h w channels"], size: int) -> Float[Array, "batch size size channels"]:
    """Returns means over `size` × `size` cells, which overlap if the map does not divide evenly.

    As in `torch.nn.AdaptiveAvgPool2d`, cell i of n inputs covers floor(i n / size) to ceil((i + 1) n / size). Sums are
    taken in float32; the result has the dtype of `x`.
    """
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (jnp.asarray(_averaging(n, size), jnp.float32) for n in x.shape[1:3])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x.astype(jnp.float32)).astype(x.dtype)


def torch_shapes() -> dict[str, Shape]:
    """Returns the name and shape of every tensor that fc7 needs, in torchvision's names."""
    layers: dict[str, Shape] = {
        name: (outputs, inputs, 3, 3) for name, (inputs, outputs, _) in zip(_names(), _layers(), strict=True)
    }
    layers |= {"classifier.0": (FEATURES, GRID * GRID * STAGES[-1][-1]), "classifier.3": (FEATURES, FEATURES)}
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def convert(tensors: Mapping[str, np.ndarray]) -> Tree:
    """Returns the state of `VGG16` from tensors in torchvision's or timm's names, with or without classifier."""
    if any(name.startswith("pre_logits.") for name in tensors):
        tensors = _from_timm(tensors)
    validate_shapes(tensors, torch_shapes(), {"classifier.6.weight", "classifier.6.bias"})

    def layer(name: str, kernel: np.ndarray) -> Tree:
        return {"kernel": as_float32(kernel), "bias": as_float32(tensors[f"{name}.bias"])}

    # torchvision flattens the last map with channels first, this network with channels last, so fc6's inputs move.
    fc6 = tensors["classifier.0.weight"].reshape(FEATURES, -1, GRID, GRID).transpose(2, 3, 1, 0)
    return {
        "convolutions": {i: layer(n, tensors[f"{n}.weight"].transpose(2, 3, 1, 0)) for i, n in enumerate(_names())},
        "fc6": layer("classifier.0", fc6.reshape(-1, FEATURES)),
        "fc7": layer("classifier.3", tensors["classifier.3.weight"].T),
    }


def _layers() -> list[tuple[int, int, bool]]:
    """Returns each convolution's inputs, its outputs, and whether a pool follows it."""
    widths = [(width, i == len(stage)) for stage in STAGES for i, width in enumerate(stage, start=1)]
    return [(i, o, pools) for (i, _), (o, pools) in itertools.pairwise([(3, False), *widths])]


def _names() -> list[str]:
    """Returns the convolutions' names, which number torchvision's sequence of convolutions, ReLUs and pools."""
    sizes = (3 if pools else 2 for _, _, pools in _layers()[:-1])
    return [f"features.{index}" for index in itertools.accumulate(sizes, initial=0)]


def _from_timm(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors in torchvision's names and shapes; timm has fc6 and fc7 as convolutions."""
    names = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        is_matrix = layer in ("pre_logits.fc1", "pre_logits.fc2") and part == "weight"
        flat = tensor.reshape(len(tensor), -1) if is_matrix and tensor.ndim == 4 else tensor
        renamed[f"{names.get(layer, layer)}.{part}"] = flat
    return renamed


def _averaging(inputs: int, outputs: int) -> np.ndarray:
    matrix = np.zeros((outputs, inputs))
    for i in range(outputs):
        start, end = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        matrix[i, start:end] = 1 / (end - start)
    return matrix
