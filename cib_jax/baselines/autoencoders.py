"""Auto-encoders with a binary bottleneck: the binary auto-encoder and TBH."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    mirrored decoder. The loss is the mean squared error. Width, optimizer, batch size and epochs are those of CIBHash,
    so that the two methods differ only in what their codes are trained for.

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


# TBH


def twin_bottleneck(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    hidden: int = 1024,
    wide: int = 512,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> Network:
    """Returns the encoder of an auto-encoder whose bits decide which images of a batch share their real values.

    Standardized features → CIBHash's head → bits, and beside them `wide` values from 0 to 1 of the same hidden layer.
    The values are averaged over the batch by the similarity of the bits, and decoded. Two discriminators, one layer
    each, attract the bits and the averages to uniform distributions. Widths are those of the published code, the
    optimizer, batch size and epochs those of CIBHash.

    References:
      Shen et al., Auto-encoding twin-bottleneck hashing, CVPR 2020 (https://arxiv.org/abs/2002.11930).
    """
    validate_features(features, bits)
    init_key, train_key = jax.random.split(key)
    center, spread = standardization(features)
    shapes = {
        "encode 1": (features.shape[1], hidden),
        "encode 2": (hidden, bits),
        "values": (hidden, wide),
        "graph": (wide, wide),
        "decode 1": (wide, hidden),
        "decode 2": (hidden, features.shape[1]),
        "judge bits": (bits, 1),
        "judge values": (wide, 1),
    }
    params = minimize(
        initial_layers(init_key, shapes),
        lambda params, batch, key: twin_bottleneck_loss(params, (batch - center) / spread, key),
        jnp.asarray(features, jnp.float32),
        train_key,
        Schedule(epochs, batch_size, learning_rate),
    )
    return _encoder(params, center, spread)


def twin_bottleneck_loss(
    params: dict[str, Array], standardized: Float[Array, "batch features"], key: PRNGKeyArray
) -> Float[Array, ""]:
    """Returns half the mean squared distance of decoded features, plus the losses of both discriminators.

    The gradient of these is reversed where it leaves a discriminator, so that one descent trains both sides of the
    game: discriminators tell what is drawn from what is encoded, and the encoder prevents it. `key` draws.
    """
    hidden = jax.nn.relu(_layer(params, "encode 1", standardized))
    chances = jax.nn.sigmoid(_layer(params, "encode 2", hidden))
    bits = chances + jax.lax.stop_gradient((chances > 0.5) - chances)
    values = _layer(params, "graph", jax.nn.sigmoid(_layer(params, "values", hidden)))
    averages = jax.nn.sigmoid(bit_graph(bits) @ values)
    decoded = two_layers(params, "decode", averages)
    bit_key, value_key = jax.random.split(key)
    drawn = {
        "judge bits": jax.random.bernoulli(bit_key, shape=bits.shape).astype(jnp.float32),
        "judge values": jax.random.uniform(value_key, averages.shape),
    }
    loss = jnp.mean(jnp.sum(jnp.square(decoded - standardized), axis=1)) / 2
    for name, encoded in {"judge bits": bits, "judge values": averages}.items():
        reversed_gradient = 2 * jax.lax.stop_gradient(encoded) - encoded
        for rows, real in ((drawn[name], 1.0), (reversed_gradient, 0.0)):
            verdicts = _layer(params, name, rows)
            loss += jnp.mean(optax.sigmoid_binary_cross_entropy(verdicts, jnp.full_like(verdicts, real)))
    return loss


def bit_graph(bits: Float[Array, "batch bits"]) -> Float[Array, "batch batch"]:
    """Returns D^(−1/2) A D^(−1/2), with A = (1 − share of unequal bits)^1.4, as published, and the degrees D of A."""
    unequal = (bits @ (1 - bits).T + (1 - bits) @ bits.T) / bits.shape[1]
    links = jnp.maximum(1 - unequal, 0.0) ** 1.4
    scale = jax.lax.rsqrt(jnp.sum(links, axis=1))
    return scale[:, None] * links * scale


def _layer(params: dict[str, Array], name: str, inputs: Float[Array, "batch inputs"]) -> Float[Array, "batch outputs"]:
    return inputs @ params[name] + params[f"{name} bias"]


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
