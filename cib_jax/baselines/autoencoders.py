"""Binary auto-encoder, and the standardization of its features."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from cib_jax.baselines.linear import validate_features
from cib_jax.baselines.networks import Network, Schedule, initial_layers, minimize, two_layers
from cib_jax.codes import sample_codes

# Binary auto-encoder


def autoencoder(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    hidden: int = 1024,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> Network:
    """Returns the encoder of an auto-encoder with a binary bottleneck.

    Standardized features → CIBHash's head → CIBHash's binary layer (sampled bits, straight-through gradient) → a
    mirrored decoder. The loss is the mean squared error. Width, optimizer, batch size and epochs are by default those
    of the paper, so that the two methods differ only in what their codes are trained for.

    References:
      Carreira-Perpiñán and Raziperchikolaei, Hashing with binary autoencoders, CVPR 2015; with sampled bits, Dai et
      al., Stochastic generative hashing, ICML 2017.
    """
    validate_features(features, bits)
    init_key, train_key = jax.random.split(key)
    center, spread = standardization(features)
    wide = features.shape[1]
    shapes = {
        "encode 1": (wide, hidden),
        "encode 2": (hidden, bits),
        "decode 1": (bits, hidden),
        "decode 2": (hidden, wide),
    }
    params = initial_layers(init_key, shapes)
    params = minimize(
        params,
        lambda params, batch, key: reconstruction_loss(params, (batch - center) / spread, key),
        jnp.asarray(features, jnp.float32),
        train_key,
        Schedule(epochs, batch_size, learning_rate),
    )
    return _encoder(params, center, spread)


def reconstruction_loss(
    params: dict[str, Array], standardized: Float[Array, "batch features"], key: PRNGKeyArray
) -> Float[Array, ""]:
    """Returns the mean squared error of features that are decoded from codes sampled with `key`."""
    codes = sample_codes(key, two_layers(params, "encode", standardized))
    return jnp.mean(jnp.square(two_layers(params, "decode", codes) - standardized))


# Shared: standardization


def standardization(
    features: Float[np.ndarray, "n features"],
) -> tuple[Float[Array, " features"], Float[Array, " features"]]:
    """Returns the mean and the standard deviation of each feature; 1 for a constant one."""
    mean = np.mean(features, axis=0, dtype=np.float64)
    deviation = np.std(features, axis=0, dtype=np.float64)
    # A constant feature has only rounding errors left, which a division would raise to the scale of the others.
    deviation = np.where(deviation > 1e-6 * np.abs(mean), deviation, 1)
    return jnp.asarray(mean, jnp.float32), jnp.asarray(deviation, jnp.float32)


def _encoder(params: dict[str, Array], center: Array, spread: Array) -> Network:
    return Network(center, spread, {name: array for name, array in params.items() if name.startswith("encode")})
