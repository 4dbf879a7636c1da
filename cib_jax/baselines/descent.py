"""Training a small head on features in memory: Adam over mini-batches, all of it one compiled program."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

Params = TypeVar("Params")
Loss = Callable[[Params, Float[Array, "batch features"], PRNGKeyArray], Float[Array, ""]]


def minimise(
    params: Params,
    loss: Loss,
    features: Float[Array, "n features"],
    key: PRNGKeyArray,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> Params:
    """Returns the parameters after `epochs` passes over the features, in an order that `key` decides.

    What does not fill a batch is left out of an epoch; with fewer rows than `batch_size`, all make one batch.
    """
    batch = min(batch_size, len(features))
    steps = len(features) // batch
    optimiser = optax.adam(learning_rate)

    @jax.jit
    def epoch(carry, features, number):
        order_key, noise_key = jax.random.split(jax.random.fold_in(key, number))
        order = jax.random.permutation(order_key, len(features))[: steps * batch].reshape(steps, batch)

        def step(carry, at):
            params, state = carry
            rows, which = at
            gradient = jax.grad(loss)(params, features[rows], jax.random.fold_in(noise_key, which))
            updates, state = optimiser.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, (order, jnp.arange(steps)))[0]

    start = (params, optimiser.init(params))
    return functools.reduce(lambda carry, number: epoch(carry, features, number), range(epochs), start)[0]
