"""A ConvNet for small images, trained from scratch with the hash head, without batch statistics."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.models import conv
from cib_jax.models.conv import Convolution

WIDTHS = (32, 64, 128)
FEATURES = 256


class Layer(Convolution):
    """A 3×3 convolution, standardized per image, with a pool and a ReLU."""

    def __call__(self, x: Float[Array, "batch h w inputs"]) -> Float[Array, "batch h//2 w//2 outputs"]:
        """Applies the layer."""
        x = _standardize(conv.conv(x, *self.arrays))
        # Maximum and ReLU commute; in this order only a quarter of the ReLUs is computed.
        return jax.nn.relu(conv.max_pool_2x2(x))


class ConvNet(nnx.Module):
    """Three 3×3 convolutions, each standardized per channel and halving the map, then a linear layer over the last map.

    The channels of each image are standardized by themselves (instance normalization, https://arxiv.org/abs/1607.08022,
    without parameters). Otherwise, if all images have much in common, such as digits on black, stochastic codes first
    learn to be all alike: this lowers the contrastive loss to log(2 × batch − 1), where its gradient vanishes.
    """

    def __init__(self, rngs: nnx.Rngs, image_size: int):
        channels = zip((3, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.convolutions = nnx.List([Layer(rngs, 3, 3, i, o) for i, o in channels])
        side = image_size // 2 ** len(WIDTHS)
        self.linear = Convolution(rngs, side * side * WIDTHS[-1], FEATURES)
        self.image_size = image_size

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch 256"]:
        """Returns the features of normalized images.

        Raises:
          ValueError: The images do not have the size that the network was built for.
        """
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images must be {self.image_size} × {self.image_size}, the size that this ConvNet was built for, got "
                f"{images.shape[1]} × {images.shape[2]}; resize them or build the network for their size"
            )
        x = conv.in_turn(self.convolutions, images)
        kernel, bias = self.linear.arrays
        return jax.nn.relu(x.reshape(x.shape[0], -1) @ kernel + bias[None])


def _standardize(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h w channels"]:
    """Returns each image's channels with mean 0 and variance 1 over their pixels; a constant channel becomes 0."""
    centered = x - jnp.mean(x, axis=(1, 2), keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=(1, 2), keepdims=True) + 1e-5)
