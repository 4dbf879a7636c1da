"""A small ConvNet for small images, trained from scratch with the hash head; it keeps no batch statistics."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.models import conv
from cib_jax.models.conv import Convolution

WIDTHS = (32, 64, 128)
FEATURES = 256


class Layer(Convolution):
    """A 3×3 convolution, standardised, pooled, and a ReLU."""

    def __call__(self, x: Float[Array, "batch h w inputs"]) -> Float[Array, "batch h//2 w//2 outputs"]:
        """Applies the layer."""
        x = _standardise(conv.conv(x, *self.arrays))
        # The pool comes before the ReLU: the result is the same and a quarter of the ReLUs remain.
        return jax.nn.relu(conv.max_pool_2x2(x))


class ConvNet(nnx.Module):
    """Three 3×3 convolutions, each standardised per channel and halving the map, then one linear layer over all of it.

    Each image's channels are standardised by themselves (instance normalization, https://arxiv.org/abs/1607.08022,
    without parameters). Where all images have much in common, as digits on black have, stochastic codes would otherwise
    learn first to be all alike: that already lowers the contrast to log(2 × batch − 1), and nothing leads out of it.
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
            ValueError: if the images are not of the size that the network was built for.
        """
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {images.shape[1]} × {images.shape[2]} but this ConvNet was built for "
                f"{self.image_size} × {self.image_size}: resize them or build it for their size."
            )
        x = images
        for layer in self.convolutions:
            x = layer(x)
        kernel, bias = self.linear.arrays
        return jax.nn.relu(x.reshape(x.shape[0], -1) @ kernel + bias)


def _standardise(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h w channels"]:
    """Returns each image's channels with mean 0 and variance 1 over their pixels; a constant channel becomes 0."""
    centered = x - jnp.mean(x, axis=(1, 2), keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=(1, 2), keepdims=True) + 1e-5)
