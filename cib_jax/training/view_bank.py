"""The view bank of a frozen backbone: features of a few augmented views per image, computed once."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from cib_jax import encoding
from cib_jax.encoder import Encoder, Params


def build(
    key: PRNGKeyArray,
    encoder: Encoder,
    frozen: Params,
    batches: Callable[[], Iterable[UInt8[np.ndarray, "batch height width 3"]]],
    *,
    count: int,
    views: int,
    family: str = "photo",
    on_images: Callable[[int], None] = lambda images: None,
) -> Float[Array, "views images features"]:
    """Returns features of `views` views of every image, drawn from the same family as in training.

    Args:
      key: a random key; view k of image i depends on it, k and i alone, not on the batch size.
      encoder: whose backbone is frozen.
      frozen: the backbone's parameters.
      batches: gives all images in order at each call.
      count: how many images there are.
      views: how many per image.
      family: of the augmentation.
      on_images: told the number of views done after each batch.
    """
    compute = jax.jit(functools.partial(_features, encoder=encoder, family=family))
    bank = np.empty((views, count, encoder.backbone.features), np.float32)
    for view, rows in enumerate(bank):
        of_view = functools.partial(compute, frozen, jax.random.fold_in(key, view))
        start = 0
        for features in encoding.map_batches(of_view, batches(), on_images):
            rows[start : start + len(features)] = features
            start += len(features)
    return jnp.asarray(bank)


def _features(
    frozen: Params,
    key: PRNGKeyArray,
    images: UInt8[Array, "batch height width 3"],
    first: Int[Array, ""],
    *,
    encoder: Encoder,
    family: str,
) -> Float[Array, "batch features"]:
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(images.shape[0]))
    return encoder.features({}, frozen, encoder.view_each(keys, images, family=family))


def draw_pairs(
    key: PRNGKeyArray, bank: Float[Array, "views images features"], indices: Int[Array | np.ndarray, " batch"]
) -> tuple[Float[Array, "batch features"], Float[Array, "batch features"]]:
    """Returns features of two different views, drawn evenly, of each image named in `indices`."""
    views = bank.shape[0]
    key1, key2 = jax.random.split(key)
    first = jax.random.randint(key1, indices.shape, 0, views)
    second = (first + jax.random.randint(key2, indices.shape, 1, views)) % views
    return bank[first, indices], bank[second, indices]
