"""A batch that goes through the backbone in parts: all of its features, in the memory that one part takes.

GradCache (https://arxiv.org/abs/2101.06983): the contrast compares every code with every other, so gradients of parts
that know nothing of each other would be those of another loss. Features of all parts are made first, and nothing else
of them is kept; the loss of the whole batch gives the gradient of each feature; then each part is made once more, and
its features' gradient goes back to the parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from cib_jax.augment import augment
from cib_jax.distributed.sharding import Axis
from cib_jax.errors import ConfigError
from cib_jax.models.encoder import Encoder, Params


def validate_micro_batch(micro_batch: int, rows: int) -> None:
    """Checks that the `rows` images of a batch that one device holds can be cut into parts of `micro_batch` (0: one).

    Raises:
      PartsError: they cannot.
    """
    if micro_batch < 0 or (micro_batch and rows % micro_batch):
        raise ConfigError(
            f"config.micro_batch: {micro_batch} does not divide the {rows} images of a batch that one device holds; "
            f"choose a divisor of {rows}, or 0 for all at once"
        )


def features_of_two_views(
    params: Params,
    frozen: Params,
    images: UInt8[Array, "batch height width 3"],
    key: PRNGKeyArray,
    *,
    encoder: Encoder,
    micro_batch: int,
    family: str = "photo",
    axis: Axis = None,
) -> Float[Array, "2*batch features"]:
    """Returns the features of the first views, then of the second, of `micro_batch` images at a time.

    Views and, up to rounding, features and gradients are those of `encoder.two_views(key, images, …)` at once. A
    backbone that is not trained takes no second pass.

    Args:
      params: of the encoder; gradients go to those of its backbone.
      frozen: of the encoder.
      images: this device's rows of the batch.
      key: decides the views.
      encoder: whose backbone takes images.
      micro_batch: a divisor of the number of images.
      family: of the views.
      axis: see `spread`.

    Raises:
      PartsError: `micro_batch` is 0 or no divisor, or the backbone takes features.
    """
    rows = images.shape[0]
    validate_micro_batch(micro_batch, rows)
    if encoder.backbone.takes == "features" or not micro_batch:
        raise ConfigError("config.micro_batch: only images go through a backbone in parts; set it to 0 for features")

    def of_part(
        trained: Params, frozen: Params, part: tuple[PRNGKeyArray, PRNGKeyArray, Array]
    ) -> Float[Array, "2 micro_batch features"]:
        *keys, some = part
        views = encoder.view_each(jnp.concatenate(keys), jnp.concatenate((some, some)), family=family)
        return encoder.features(trained, frozen, views).reshape(2, micro_batch, -1)

    of_rows = (*augment.two_view_keys(key, rows, axis), images)
    parts = tuple(array.reshape(-1, micro_batch, *array.shape[1:]) for array in of_rows)
    # The head takes the whole batch, so that only what needs it is done twice.
    trained = {name: part for name, part in params.items() if name != "head"}
    found = _in_turn(of_part, trained, frozen, parts)
    return found.swapaxes(0, 1).reshape(2 * rows, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turn(function: Callable[[Params, Params, Any], Array], params: Params, frozen: Params, parts: Any) -> Array:
    """Returns `function(params, frozen, part)` of each part, stacked.

    Its gradient, of `params` alone, makes each part again instead of keeping what lay between. A loop, on every
    platform: parts that are written out one by one are merged again with their first making, and all are kept.
    """
    return jax.lax.map(lambda part: function(params, frozen, part), parts)


def _forward(function, params, frozen, parts):
    return _in_turn(function, params, frozen, parts), (params, frozen, parts)


def _backward(function, kept, gradients):
    params, frozen, parts = kept

    def add(total, at):
        part, gradient = at
        _, pull_back = jax.vjp(lambda params: function(params, frozen, part), params)
        return jax.tree.map(jnp.add, total, *pull_back(gradient)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (parts, gradients))
    return total, None, None


_in_turn.defvjp(_forward, _backward)
