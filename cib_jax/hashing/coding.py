"""From images to packed codes as at test time: two programs, pure and compiled, one device or many.

Two and not one: where features are computed once and kept, the codes must be the same to the last bit.
"""

import functools

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped, UInt8

from cib_jax import binary
from cib_jax.devices import parallel
from cib_jax.encoder import Encoder, Params


@functools.partial(jax.jit, static_argnums=(0, 4))
def plain_features(
    encoder: Encoder, params: Params, frozen: Params, images: Shaped[Array, "batch ..."], over: Mesh | None = None
) -> Float[Array, "batch features"]:
    """Returns the backbone's features of images as at test time, unaugmented; the rows spread `over` devices."""

    def features(held: tuple[Params, Params], images: Array) -> Array:
        return encoder.features(*held, encoder.preprocess(images))

    return parallel.by_rows(features, over)((params, frozen), images)


@functools.partial(jax.jit, static_argnums=(0, 3))
def packed_of_features(
    encoder: Encoder, params: Params, features: Float[Array, "batch features"], over: Mesh | None = None
) -> UInt8[Array, "batch bytes"]:
    """Returns the packed codes of features; the rows spread `over` devices."""
    return parallel.by_rows(lambda params, rows: binary.pack_bits(encoder.head(params, rows)), over)(params, features)


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits_of_features(
    encoder: Encoder, params: Params, features: Float[Array, "batch features"], over: Mesh | None = None
) -> Float[Array, "batch bits"]:
    """Returns the logits of features; the rows spread `over` devices."""
    return parallel.by_rows(encoder.head, over)(params, features)
