"""PCA sign: a bit per principal axis."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from cib_jax.baselines import fitting, principal
from cib_jax.baselines.hyperplanes import Hyperplanes


def fit(features: Float[np.ndarray, "n features"], bits: int, key: PRNGKeyArray) -> Hyperplanes:
    """Returns the signs of the first `bits` principal components. `key` is not used.

    The relaxed solution of unsupervised hashing in Wang, Kumar and Chang, Semi-supervised hashing for scalable image
    retrieval, CVPR 2010: bits of greatest variance, uncorrelated and balanced.

    Raises:
      ValueError: features or bits are malformed, or there are fewer features than bits.
    """
    del key
    fitting.check(features, bits, most=features.shape[-1], why="the number of features: each bit takes an axis")
    found = principal.axes(features, bits)
    return Hyperplanes(jnp.asarray(found.mean, jnp.float32), jnp.asarray(found.axes, jnp.float32))
