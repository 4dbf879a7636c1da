"""Bi-half: each bit splits every batch in two halves, so that it carries all it can."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from cib_jax.baselines import fitting, similarity
from cib_jax.baselines.hyperplanes import Hyperplanes


def fit(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    gamma: float = 6.0,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-4,
) -> Hyperplanes:
    """Returns a linear head whose codes, balanced bit by bit, keep the cosines of features.

    Li and van Gemert, Deep unsupervised image hashing by maximizing bit entropy, AAAI 2021
    (https://arxiv.org/abs/2012.12334), with the γ and the learning rate of its CIFAR-10 experiment; Adam for its SGD.

    Raises:
      ValueError: features or bits are malformed.
    """
    fitting.check(features, bits)
    return similarity.fit_linear(
        features,
        bits,
        key,
        lambda logits, batch: similarity.cosine_loss(halves(logits, gamma), batch),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )


def halves(logits: Float[Array, "batch bits"], gamma: float) -> Float[Array, "batch bits"]:
    """Returns ±1 codes of which, bit by bit, the upper half of the batch is +1: the nearest balanced ones (equation 8).

    The gradient of a code is that of its logit plus γ (logit − code) / (batch · bits), which draws logits to their
    codes (equation 9). Of an odd batch, the smaller half is +1; of equal logits, the earlier is the upper.
    """
    codes = _balanced(jax.lax.stop_gradient(logits))
    return _drawn(logits, codes, gamma / logits.size)


def _balanced(logits: Float[Array, "batch bits"]) -> Float[Array, "batch bits"]:
    ranks = jnp.argsort(jnp.argsort(-logits, axis=0, stable=True), axis=0)
    return jnp.where(ranks < len(logits) // 2, 1.0, -1.0)


@jax.custom_vjp
def _drawn(logits: Array, codes: Array, weight: float) -> Array:
    """Returns `codes`."""
    del logits, weight
    return codes


def _forward(logits: Array, codes: Array, weight: float):
    return codes, (logits, codes, weight)


def _backward(kept, gradient):
    logits, codes, weight = kept
    return gradient + weight * (logits - codes), jnp.zeros_like(codes), jnp.zeros_like(weight)


_drawn.defvjp(_forward, _backward)
