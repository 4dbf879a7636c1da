"""Baselines trained to keep the cosines of features: GreedyHash, Bi-half, SSDH and SDC."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from cib_jax.baselines.linear import Hyperplanes, validate_features
from cib_jax.baselines.networks import Network, Schedule, fit_head, fit_normalized, unit_rows
from cib_jax.codes import binarize

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
    return fit_head(features, bits, key, greedy_loss, Schedule(epochs, batch_size, learning_rate))


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

    return fit_head(features, bits, key, loss, Schedule(epochs, batch_size, learning_rate))


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


# SSDH


def ssdh(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    width: float = 2.0,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> Hyperplanes:
    """Returns a linear head whose codes join pairs that are clearly similar, and part those that clearly are not.

    Cosine distances of the training pairs have a histogram of one peak, and each of its sides is described by half a
    Gaussian. Pairs below the peak by more than `width` left deviations are similar, those above it by more than `width`
    right deviations are dissimilar, and all others do not count. Cosines are those of centered features, as for the
    other baselines, and the linear layer takes the place of the last one of the published network.

    References:
      Yang et al., Semantic structure-based unsupervised deep hashing, IJCAI 2018
      (https://www.ijcai.org/proceedings/2018/148).
    """
    validate_features(features, bits)
    pair_key, train_key = jax.random.split(key)
    near, far = distance_limits(some_distances(features, pair_key), width)
    loss = functools.partial(structure_loss, near=near, far=far)
    return fit_head(features, bits, train_key, loss, Schedule(epochs, batch_size, learning_rate))


def distance_limits(distances: Float[np.ndarray, " pairs"], width: float) -> tuple[float, float]:
    """Returns the distances below which a pair is similar, and above which it is dissimilar."""
    peak, left, right = half_gaussians(distances)
    return peak - width * left, peak + width * right


def half_gaussians(distances: Float[np.ndarray, " pairs"]) -> tuple[float, float, float]:
    """Returns the peak of distances, and the deviations of those below and above it.

    The peak is the middle of the fullest of 100 equal bins; the deviation of each side is that from the peak.
    """
    counts, edges = np.histogram(distances, bins=100)
    fullest = int(np.argmax(counts))
    peak = (edges[fullest] + edges[fullest + 1]) / 2
    left, right = (
        np.sqrt(np.mean(np.square(side - peak))) for side in (distances[distances <= peak], distances[distances > peak])
    )
    return float(peak), float(left), float(right)


def some_distances(features: Float[np.ndarray, "n features"], key: PRNGKeyArray) -> Float[np.ndarray, " pairs"]:
    """Returns the cosine distances of all pairs of up to 1,000 centered rows."""
    chosen = np.asarray(jax.random.permutation(key, len(features))[:1000])
    rows = features[chosen] - np.mean(features, axis=0, dtype=np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-8)
    return 1 - (rows @ rows.T)[np.triu_indices(len(rows), 1)]


def structure_loss(
    logits: Float[Array, "batch bits"], features: Float[Array, "batch features"], *, near: float, far: float
) -> Float[Array, ""]:
    """Returns the mean of (s − h · h′ / bits)² over the pairs with s = ±1, for relaxed codes h = tanh(logits).

    s is 1 below the distance `near` and −1 above `far`.
    """
    codes = jnp.tanh(logits)
    rows = unit_rows(features)
    distances = 1 - rows @ rows.T
    wanted = jnp.where(distances < near, 1.0, jnp.where(distances > far, -1.0, 0.0))
    difference = jnp.square(wanted - codes @ codes.T / logits.shape[1])
    return jnp.sum(jnp.where(wanted != 0, difference, 0.0)) / jnp.maximum(jnp.sum(wanted != 0), 1)


# SDC


def sdc(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> Network:
    """Returns a network of two layers whose codes have the order of the features' cosines, spread over the whole range.

    As in the published code, the logits are normalized over each batch, and there is no contrast between views;
    the hidden layer has ReLU for GELU, and cosines are those of centered features.

    References:
      Ng et al., Unsupervised hashing with similarity distribution calibration, BMVC 2023
      (https://arxiv.org/abs/2302.07669).
    """

    validate_features(features, bits)
    return fit_normalized(features[None], bits, key, calibration_loss, Schedule(epochs, batch_size, learning_rate))


def calibration_loss(logits: Float[Array, "batch bits"], features: Float[Array, "batch features"]) -> Float[Array, ""]:
    """Returns the mean absolute difference between the cosines of logits and those that their rank asks for.

    The pairs are those of `cosine_loss`. The r-th smallest cosine of features asks for the (r − ½)/pairs quantile of
    the Beta distribution of parameters 2 and 2, stretched to [−1, 1]; a negative one becomes 0, of unrelated codes.
    """
    import scipy.stats  # takes a second, which every command would wait for

    half = len(logits) // 2
    order = jnp.argsort(_cosine(features[:half], features[half : 2 * half]))
    wanted = 2 * scipy.stats.beta.ppf((np.arange(half) + 0.5) / half, 2, 2) - 1
    found = _cosine(logits[:half], logits[half : 2 * half])[order]
    return jnp.mean(jnp.abs(found - jnp.maximum(jnp.asarray(wanted, jnp.float32), 0.0)))


# Shared: loss of cosines


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
