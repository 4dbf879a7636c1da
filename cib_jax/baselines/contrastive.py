"""Baselines that learn from the agreement of views: CroVCA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from cib_jax.baselines.linear import validate_features
from cib_jax.baselines.networks import Network, Schedule, fit_normalized

# CroVCA


def crovca(
    views: Float[np.ndarray, "views n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> Network:
    """Returns a network of two layers by which each view predicts the bits of another, and whose bits are diverse.

    As in the published code, the logits are normalized over each batch, and the coding rate has a weight of 0.1 and a
    distortion ε of 0.05; Adam has a constant learning rate, and batches and epochs are those of the other methods.

    References:
      Moummad et al., Image hashing via cross-view code alignment in the age of foundation models, 2025
      (https://arxiv.org/abs/2510.27584).
    """
    for view in views:
        validate_features(view, bits)
    return fit_normalized(views, bits, key, alignment_loss, Schedule(epochs, batch_size, learning_rate))


def alignment_loss(logits1: Float[Array, "batch bits"], logits2: Float[Array, "batch bits"]) -> Float[Array, ""]:
    """Returns the mean cross-entropy of each view's logits with the other's bits, less 0.1 times the coding rate."""
    bits1, bits2 = (jax.lax.stop_gradient((logits > 0).astype(jnp.float32)) for logits in (logits1, logits2))
    entropy = optax.sigmoid_binary_cross_entropy
    alignment = (jnp.mean(entropy(logits1, bits2)) + jnp.mean(entropy(logits2, bits1))) / 2
    return alignment - 0.1 * (coding_rate(logits1) + coding_rate(logits2)) / 2


def coding_rate(logits: Float[Array, "batch bits"], epsilon: float = 0.05) -> Float[Array, ""]:
    """Returns ½ log det(I + bits / (batch · ε) Zᵀ Z) · (bits + batch) / (bits · batch), for rows Z of unit length."""
    batch, bits = logits.shape
    rows = logits / jnp.maximum(jnp.linalg.norm(logits, axis=1, keepdims=True), 1e-12)
    factor = jnp.linalg.cholesky(jnp.eye(bits) + bits / (batch * epsilon) * rows.T @ rows)
    return jnp.sum(jnp.log(jnp.diagonal(factor))) * (bits + batch) / (bits * batch)
