"""GreedyHash, its unsupervised form: the sign in the forward pass, its gradient passed on unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from cib_jax import codes
from cib_jax.baselines import fitting, similarity
from cib_jax.baselines.hyperplanes import Hyperplanes


def fit(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-4,
) -> Hyperplanes:
    """Returns a linear head whose codes keep the cosines of features.

    Su et al., Greedy Hash: Towards fast optimization for accurate hash coding in CNN, NeurIPS 2018 (section 4.3), with
    the linear layer, the learning rate and the loss of its published code, mean squared difference of cosines
    + 0.1 · mean ||h| − 1|³ on logits h; Adam for its SGD.

    Raises:
      ValueError: features or bits are malformed.
    """
    fitting.check(features, bits)
    return similarity.fit_linear(
        features, bits, key, loss, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate
    )


def loss(logits: Float[Array, "batch bits"], features: Float[Array, "batch features"]) -> Float[Array, ""]:
    """Returns the difference of cosines, and what draws logits to ±1."""
    drawn = jnp.mean(jnp.abs(jnp.abs(logits) - 1) ** 3)
    return similarity.cosine_loss(sign(logits), features) + 0.1 * drawn


def sign(logits: Float[Array, "batch bits"]) -> Float[Array, "batch bits"]:
    """Returns ±1 codes; the gradient of a code is that of its logit."""
    return logits + jax.lax.stop_gradient(codes.binarize(logits) - logits)
