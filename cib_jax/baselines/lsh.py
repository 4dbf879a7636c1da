"""Locality-sensitive hashing: random hyperplanes through the mean."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from cib_jax.baselines import fitting
from cib_jax.baselines.hyperplanes import Hyperplanes


def fit(features: Float[np.ndarray, "n features"], bits: int, key: PRNGKeyArray) -> Hyperplanes:
    """Returns random hyperplanes through the mean of `features`; nothing else is learnt.

    Charikar, Similarity estimation techniques from rounding algorithms, STOC 2002: two points at angle θ, seen from the
    mean, differ in each bit with probability θ/π.

    Raises:
      ValueError: features or bits are malformed.
    """
    fitting.check(features, bits)
    mean = np.mean(features, axis=0, dtype=np.float64)
    return Hyperplanes(jnp.asarray(mean, jnp.float32), jax.random.normal(key, (features.shape[1], bits)))
