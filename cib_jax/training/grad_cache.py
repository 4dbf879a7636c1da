"""GradCache: features of a whole batch in the memory of a small part of it (https://arxiv.org/abs/2101.06983).

The contrast compares every code with every other, so that the gradients of separate parts would be those of another
loss. Instead, the features of all parts are computed first, and nothing else is kept; the loss of the whole batch gives
the gradient of each feature; then every part is computed a second time, and its gradient is passed back to the
parameters.
"""

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
    """Checks that the `rows` images of a batch on one device can be cut into parts of `micro_batch` (0: one part)."""
    if micro_batch < 0 or (micro_batch and rows % micro_batch):
        raise ConfigError(
            f"config.micro_batch must be a divisor of the {rows} images of a batch on one device, or 0 for all at "
            f"once, got {micro_batch}",
            field="config.micro_batch",
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
    """Returns the features of all first views, then of all second views, `micro_batch` images at a time.

    Views are those of `encoder.two_views(key, images, ...)`; features and gradients are the same up to rounding. There
    is no second pass if the backbone is not trained. `micro_batch` must divide the number of images.
    """
    rows = images.shape[0]
    validate_micro_batch(micro_batch, rows)
    if encoder.backbone.takes == "features" or not micro_batch:
        raise ConfigError(
            f"config.micro_batch must be 0 for features, which go through no backbone, got {micro_batch}",
            field="config.micro_batch",
        )

    def features_of_part(
        trained: Params, frozen: Params, part: tuple[augment.ImageKeys, augment.ImageKeys, Array]
    ) -> Float[Array, "2 micro_batch features"]:
        *keys, some_images = part
        views = encoder.view_each(jnp.concatenate(keys), jnp.concatenate((some_images, some_images)), family=family)
        return encoder.features(trained, frozen, views).reshape(2, micro_batch, -1)

    of_rows = (*augment.two_view_keys(key, rows, axis), images)
    parts = tuple(array.reshape(-1, micro_batch, *array.shape[1:]) for array in of_rows)
    # Without the head, which takes the features of the whole batch: only the backbone is computed twice.
    trained = {name: part for name, part in params.items() if name != "head"}
    features = _in_turn(features_of_part, trained, frozen, parts)
    return features.swapaxes(0, 1).reshape(2 * rows, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turn(function: Callable[[Params, Params, Any], Array], params: Params, frozen: Params, parts: Any) -> Array:
    """Returns `function(params, frozen, part)` of each part, stacked; differentiable in `params` alone.

    The gradient recomputes each part instead of keeping its activations. It must be a loop: XLA would merge unrolled
    parts with their first computation, and keep all activations after all.
    """
    return jax.lax.map(lambda part: function(params, frozen, part), parts)


def _forward(function: Any, params: Params, frozen: Params, parts: Any) -> tuple[Any, tuple[Any, ...]]:
    return _in_turn(function, params, frozen, parts), (params, frozen, parts)


def _backward(function: Any, residuals: tuple[Any, ...], gradients: Any) -> tuple[Any, None, None]:
    params, frozen, parts = residuals

    def add(total: Any, part_and_gradient: Any) -> tuple[Any, None]:
        part, gradient = part_and_gradient
        _, pull_back = jax.vjp(lambda params: function(params, frozen, part), params)
        return jax.tree.map(jnp.add, total, *pull_back(gradient)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (parts, gradients))
    return total, None, None


_in_turn.defvjp(_forward, _backward)
