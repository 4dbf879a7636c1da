"""Trained baselines: GreedyHash, Bi-half and a binary auto-encoder, with the optimization loop that they share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from cib_jax.baselines.linear import Hyperplanes, validate_features
from cib_jax.codes import binarize, sample_codes

Params = TypeVar("Params")


class Schedule(NamedTuple):
    """Settings of the optimization."""

    epochs: int
    batch_size: int
    learning_rate: float


# GreedyHash


def greedy_hash(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-4,
) -> Hyperplanes:
    """Returns a linear head whose codes keep the cosines of features, trained by GreedyHash without labels.

    Has the linear layer, the learning rate and the loss of the published code, and Adam in place of its SGD.

    References:
      Su et al., Greedy Hash: Towards fast optimization for accurate hash coding in CNN, NeurIPS 2018 (section 4.3).
    """
    return _fit_head(features, bits, key, greedy_loss, Schedule(epochs, batch_size, learning_rate))


def greedy_loss(logits: Float[Array, "batch bits"], features: Float[Array, "batch features"]) -> Float[Array, ""]:
    """Returns the mean squared difference of cosines + 0.1 · mean ||h| − 1|³, which attracts logits h to ±1."""
    return cosine_loss(greedy_sign(logits), features) + 0.1 * jnp.mean(jnp.abs(jnp.abs(logits) - 1) ** 3)


def greedy_sign(logits: Float[Array, "batch bits"]) -> Float[Array, "batch bits"]:
    """Returns ±1 codes; the gradient with respect to a code is passed on to its logit unchanged."""
    return logits + jax.lax.stop_gradient(binarize(logits) - logits)


# Bi-half


def bi_half(
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

    Has the γ and the learning rate of the published CIFAR-10 experiment, and Adam in place of its SGD.

    References:
      Li and van Gemert, Deep unsupervised image hashing by maximizing bit entropy, AAAI 2021
      (https://arxiv.org/abs/2012.12334).
    """

    def loss(logits: Float[Array, "batch bits"], batch: Float[Array, "batch features"]) -> Float[Array, ""]:
        return cosine_loss(balanced_sign(logits, gamma), batch)

    return _fit_head(features, bits, key, loss, Schedule(epochs, batch_size, learning_rate))


def balanced_sign(logits: Float[Array, "batch bits"], gamma: float | Array) -> Float[Array, "batch bits"]:
    """Returns the nearest ±1 codes that are balanced over the batch, bit by bit (equation 8).

    Codes of the upper half of the logits are +1: ⌊batch / 2⌋ of them, and the earlier one of equal logits. The gradient
    with respect to a logit is that of its code plus γ (logit − code) / (batch · bits), which attracts logits to their
    codes (equation 9).
    """
    ranks = jnp.argsort(jnp.argsort(-jax.lax.stop_gradient(logits), axis=0, stable=True), axis=0)
    return _attracted(logits, jnp.where(ranks < len(logits) // 2, 1.0, -1.0), gamma / logits.size)


@jax.custom_vjp
def _attracted(logits: Array, codes: Array, weight: float | Array) -> Array:
    """Returns `codes`, with the gradient of equation 9."""
    del logits, weight
    return codes


def _attracted_forward(
    logits: Array, codes: Array, weight: float | Array
) -> tuple[Array, tuple[Array, Array, float | Array]]:
    return codes, (logits, codes, weight)


def _attracted_backward(residuals: tuple[Array, Array, float | Array], gradient: Array) -> tuple[Array, Array, Array]:
    logits, codes, weight = residuals
    return gradient + weight * (logits - codes), jnp.zeros_like(codes), jnp.zeros_like(weight)


_attracted.defvjp(_attracted_forward, _attracted_backward)


# Binary auto-encoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """Encoder of the auto-encoder. Linear(features → hidden), ReLU, Linear(hidden → bits), as CIBHash's own head."""

    mean: Float[Array, " features"]
    deviation: Float[Array, " features"]
    layers: dict[str, Array]

    def __call__(self, features: Float[Array | np.ndarray, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns the logits of features."""
        return _two_layers(self.layers, "encode", (features - self.mean) / self.deviation)


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
    mean = np.mean(features, axis=0, dtype=np.float64)
    deviation = np.std(features, axis=0, dtype=np.float64)
    # A constant feature has only rounding errors left, which a division would raise to the scale of the others.
    deviation = np.where(deviation > 1e-6 * np.abs(mean), deviation, 1)
    center, spread = jnp.asarray(mean, jnp.float32), jnp.asarray(deviation, jnp.float32)
    widths = features.shape[1], hidden, bits, hidden, features.shape[1]
    params = {}
    for number, name in enumerate(("encode 1", "encode 2", "decode 1", "decode 2")):
        params[name] = _uniform(jax.random.fold_in(init_key, number), widths[number : number + 2])
        params[f"{name} bias"] = jnp.zeros(widths[number + 1])
    params = minimize(
        params,
        lambda params, batch, key: reconstruction_loss(params, (batch - center) / spread, key),
        jnp.asarray(features, jnp.float32),
        train_key,
        Schedule(epochs, batch_size, learning_rate),
    )
    return Network(center, spread, {name: array for name, array in params.items() if name.startswith("encode")})


def reconstruction_loss(
    params: dict[str, Array], standardized: Float[Array, "batch features"], key: PRNGKeyArray
) -> Float[Array, ""]:
    """Returns the mean squared error of features that are decoded from codes sampled with `key`."""
    codes = sample_codes(key, _two_layers(params, "encode", standardized))
    return jnp.mean(jnp.square(_two_layers(params, "decode", codes) - standardized))


def _two_layers(
    params: dict[str, Array], name: str, inputs: Float[Array | np.ndarray, "batch inputs"]
) -> Float[Array, "batch outputs"]:
    middle = jax.nn.relu(inputs @ params[f"{name} 1"] + params[f"{name} 1 bias"])
    return middle @ params[f"{name} 2"] + params[f"{name} 2 bias"]


# Shared: similarity loss, linear head, optimization


def cosine_loss(codes: Float[Array, "batch bits"], features: Float[Array, "batch features"]) -> Float[Array, ""]:
    """Returns the mean squared difference between the cosines of codes and those of features.

    Each pair consists of an item in the first half of the batch and the item at the same position in the second half.
    """
    half = len(codes) // 2
    of_codes = _cosine(codes[:half], codes[half : 2 * half])
    of_features = _cosine(features[:half], features[half : 2 * half])
    return jnp.mean(jnp.square(of_codes - of_features))


def _cosine(a: Float[Array, "n d"], b: Float[Array, "n d"]) -> Float[Array, " n"]:
    norms = jnp.sqrt(jnp.sum(jnp.square(a), 1) * jnp.sum(jnp.square(b), 1))
    return jnp.sum(a * b, 1) / jnp.maximum(norms, 1e-8)


def _fit_head(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    loss: Callable[[Float[Array, "batch bits"], Float[Array, "batch features"]], Float[Array, ""]],
    schedule: Schedule,
) -> Hyperplanes:
    """Returns a linear head trained by a loss of (logits, features).

    Features are centered and divided by their overall standard deviation, so that one learning rate suits every
    network. Cosines are those of centered features as well. The published code takes them from the origin, where the
    outputs of a ReLU all form acute angles, and codes that keep those angles share most bits. On CIFAR-10 with 32 bits,
    the MAP@1000 of GreedyHash's first term alone is 0.290 from the origin and 0.431 from the mean.
    """
    validate_features(features, bits)
    init_key, train_key = jax.random.split(key)
    mean = np.mean(features, axis=0, dtype=np.float64)
    # In float32, as in training: a float64 copy of all features could exceed the memory.
    centered = np.asarray(features, np.float32) - mean.astype(np.float32)
    scale = max(float(np.sqrt(np.mean([np.square(row).mean(dtype=np.float64) for row in centered]))), 1e-12)
    params = minimize(
        {"kernel": _uniform(init_key, (features.shape[1], bits)), "bias": jnp.zeros(bits)},
        lambda params, batch, _: loss(batch @ params["kernel"] + params["bias"], batch),
        jnp.asarray(centered / np.float32(scale)),
        train_key,
        schedule,
    )
    return Hyperplanes(jnp.asarray(mean, jnp.float32), params["kernel"] / scale, params["bias"])


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "inputs outputs"]:
    """Returns initial weights of a linear layer, uniform within ±1/√inputs."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def minimize(
    params: Params,
    loss: Callable[[Params, Float[Array, "batch features"], PRNGKeyArray], Float[Array, ""]],
    features: Float[Array, "n features"],
    key: PRNGKeyArray,
    schedule: Schedule,
) -> Params:
    """Returns the parameters after `schedule.epochs` passes of Adam over the features, in an order that `key` decides.

    Rows that do not fill a batch are left out of an epoch. Fewer rows than `batch_size` make one batch.
    """
    batch = min(schedule.batch_size, len(features))
    steps = len(features) // batch
    optimizer = optax.adam(schedule.learning_rate)

    @jax.jit
    def epoch(carry: Any, features: Array, number: int | Array) -> Any:
        order_key, noise_key = jax.random.split(jax.random.fold_in(key, number))
        order = jax.random.permutation(order_key, len(features))[: steps * batch].reshape(steps, batch)

        def step(carry: Any, inputs: tuple[Array, Array]) -> tuple[Any, None]:
            params, state = carry
            rows, number = inputs
            gradient = jax.grad(loss)(params, features[rows], jax.random.fold_in(noise_key, number))
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, (order, jnp.arange(steps)))[0]

    start = (params, optimizer.init(params))
    return functools.reduce(lambda carry, number: epoch(carry, features, number), range(schedule.epochs), start)[0]
