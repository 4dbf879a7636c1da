"""Trained baselines: GreedyHash, Bi-half, SSDH, SDC, CroVCA and a binary auto-encoder, and how they are optimized."""

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

NORMALIZATION_EPSILON = 1e-5  # added to variances by a batch normalization, as in PyTorch


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


# SSDH


def ssdh(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    width: float = 2.0,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-4,
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
    near, far = distance_limits(_some_distances(features, pair_key), width)
    loss = functools.partial(structure_loss, near=near, far=far)
    return _fit_head(features, bits, train_key, loss, Schedule(epochs, batch_size, learning_rate))


def distance_limits(distances: Float[np.ndarray, " pairs"], width: float) -> tuple[float, float]:
    """Returns the distances below which a pair is similar, and above which it is dissimilar.

    The peak is the middle of the fullest of 100 equal bins; the deviation of each side is that from the peak.
    """
    counts, edges = np.histogram(distances, bins=100)
    fullest = int(np.argmax(counts))
    peak = (edges[fullest] + edges[fullest + 1]) / 2
    left, right = (
        np.sqrt(np.mean(np.square(side - peak))) for side in (distances[distances <= peak], distances[distances > peak])
    )
    return float(peak - width * left), float(peak + width * right)


def _some_distances(features: Float[np.ndarray, "n features"], key: PRNGKeyArray) -> Float[np.ndarray, " pairs"]:
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
    rows = features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-8)
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
    learning_rate: float = 1e-4,
) -> Network:
    """Returns a network of two layers whose codes have the order of the features' cosines, spread over the whole range.

    As in the published code, the logits are normalized over each batch, and there is no contrast between views;
    the hidden layer has ReLU for GELU, and cosines are those of centered features.

    References:
      Ng et al., Unsupervised hashing with similarity distribution calibration, BMVC 2023
      (https://arxiv.org/abs/2302.07669).
    """

    validate_features(features, bits)
    return _fit_normalized(features[None], bits, key, calibration_loss, Schedule(epochs, batch_size, learning_rate))


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
    return _fit_normalized(views, bits, key, alignment_loss, Schedule(epochs, batch_size, learning_rate))


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


def _fit_normalized(
    views: Float[np.ndarray, "views n features"],
    bits: int,
    key: PRNGKeyArray,
    loss: Callable[[Array, Array], Float[Array, ""]],
    schedule: Schedule,
) -> Network:
    """Returns a network of two layers and a batch normalization, which is made part of the last layer at the end.

    With several views, each step draws two of them, and the loss is one of their logits; with one, it is one of the
    logits and of the features, which are centered and divided by their overall standard deviation.
    """
    init_key, train_key = jax.random.split(key)
    count, width = len(views), views.shape[2]
    mean = np.mean(views, axis=(0, 1), dtype=np.float64).astype(np.float32)
    square = [np.square(row.astype(np.float32) - mean).mean(dtype=np.float64) for view in views for row in view]
    scale = jnp.full(width, max(float(np.sqrt(np.mean(square))), 1e-12), jnp.float32)
    params = {"scale": jnp.ones(bits), "shift": jnp.zeros(bits)}
    for number, widths in enumerate(((width, width), (width, bits)), 1):
        params[f"encode {number}"] = _uniform(jax.random.fold_in(init_key, number), widths)
        params[f"encode {number} bias"] = jnp.zeros(widths[1])

    def normalized(params: dict[str, Array], rows: Array) -> Array:
        logits = _two_layers(params, "encode", rows)
        deviation = jnp.sqrt(jnp.var(logits, axis=0) + NORMALIZATION_EPSILON)
        return params["scale"] * (logits - jnp.mean(logits, axis=0)) / deviation + params["shift"]

    def loss_of(params: dict[str, Array], rows: Float[Array, "batch views features"], key: PRNGKeyArray) -> Array:
        rows = (rows - mean) / scale
        if count == 1:
            return loss(normalized(params, rows[:, 0]), rows[:, 0])
        first, second = jax.random.choice(key, count, (2,), replace=False)
        return loss(normalized(params, rows[:, first]), normalized(params, rows[:, second]))

    items = jnp.asarray(np.swapaxes(views, 0, 1))
    params = minimize(params, loss_of, items, train_key, schedule)
    sums = [_two_layers(params, "encode", (jnp.asarray(view, jnp.float32) - mean) / scale) for view in views]
    center = sum(jnp.mean(logits, axis=0) for logits in sums) / count
    variance = sum(jnp.mean(jnp.square(logits - center), axis=0) for logits in sums) / count
    factor = params.pop("scale") / jnp.sqrt(variance + NORMALIZATION_EPSILON)
    params["encode 2 bias"] = (params["encode 2 bias"] - center) * factor + params.pop("shift")
    params["encode 2"] = params["encode 2"] * factor
    return Network(jnp.asarray(mean), scale, params)


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "inputs outputs"]:
    """Returns initial weights of a linear layer, uniform within ±1/√inputs."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def minimize(
    params: Params,
    loss: Callable[[Params, Float[Array, "batch *item"], PRNGKeyArray], Float[Array, ""]],
    features: Float[Array, "n *item"],
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
