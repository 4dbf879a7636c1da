"""Baselines that learn from the agreement of views: CroVCA, CIMON and OH."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int, PRNGKeyArray

from cib_jax.baselines.deep import half_gaussians, some_distances
from cib_jax.baselines.linear import MAX_SIDE, validate_features
from cib_jax.baselines.networks import (
    Network,
    Schedule,
    center_and_scale,
    fit_normalized,
    initial_layers,
    minimize,
    minimize_with_memory,
    two_layers,
    unit_rows,
)
from cib_jax.errors import UserError
from cib_jax.losses import nt_xent

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
    validate_views(views, bits)
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
    rows = unit_rows(logits)
    factor = jnp.linalg.cholesky(jnp.eye(bits) + bits / (batch * epsilon) * rows.T @ rows)
    return jnp.sum(jnp.log(jnp.diagonal(factor))) * (bits + batch) / (bits * batch)


# CIMON


class Guidance(NamedTuple):
    """What a batch's features say about its pairs."""

    signs: Float[Array, "batch batch"]
    """1 for similar pairs, −1 for all others."""
    weights: Float[Array, "batch batch"]
    """Confidence in these signs, from 0 to 1."""


def cimon(
    views: Float[np.ndarray, "views n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    clusters: int = 70,
    width: float = 2.0,
    hidden: int = 1024,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> Network:
    """Returns a network of two layers whose codes agree between views, and with reliable similarities of features.

    A pair is similar if its cosine distance is below a threshold. Pairs are left out where spectral clustering
    contradicts this, and weighted by their distance from the threshold. Two views of the bank give such similarities,
    and codes of the two views that a step draws are to have those of both. Clusters, weights and temperature are those
    of the published code. Cosines are those of centered features, and the threshold is `width` left deviations below
    the peak of their distances, as for SSDH, since none of this network's are below the published 0.1. CIBHash's head
    takes the place of the published network, all of which is trained, and Adam that of SGD; batches and epochs are
    those of the other methods.

    References:
      Luo et al., CIMON: Towards high-quality hash codes, IJCAI 2021 (https://arxiv.org/abs/2010.07804).
    """
    validate_views(views, bits)
    init_key, train_key, sample_key, cluster_key = jax.random.split(key, 4)
    mean, scale = center_and_scale(views)
    guides = np.asarray(views[:2], np.float32)
    halves = [half_gaussians(some_distances(guide, sample_key)) for guide in guides]
    labels = [spectral_clusters(guide, clusters, cluster_key) for guide in guides - np.asarray(mean)]

    def loss_of(params: dict[str, Array], items: tuple[Array, Array], key: PRNGKeyArray) -> Float[Array, ""]:
        rows, labels = items
        chosen = jax.random.choice(key, len(views), (2,), replace=False)
        guidance = [refined_similarity(rows[:, view] - mean, labels[:, view], halves[view], width) for view in range(2)]
        logits = [two_layers(params, "encode", (rows[:, view] - mean) / scale) for view in chosen]
        return consistency_loss(logits[0], logits[1], guidance)

    params = minimize(
        initial_layers(init_key, {"encode 1": (views.shape[2], hidden), "encode 2": (hidden, bits)}),
        loss_of,
        (jnp.asarray(np.swapaxes(views, 0, 1)), jnp.stack(labels, axis=1)),
        train_key,
        Schedule(epochs, batch_size, learning_rate),
    )
    return Network(mean, scale, params)


def spectral_clusters(
    centered: Float[np.ndarray, "n features"], clusters: int, key: PRNGKeyArray
) -> Int[np.ndarray, " n"]:
    """Returns the clusters of rows of unit length by their affinity exp(−‖x − x′‖²)."""
    import sklearn.cluster  # takes half a second, and few baselines need it

    if len(centered) > MAX_SIDE:
        raise UserError(
            f"features must have at most {MAX_SIDE} rows for spectral clustering, got {len(centered)}; "
            "take fewer training images",
            "features",
        )
    rows = centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-8)
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    method = sklearn.cluster.SpectralClustering(min(clusters, len(rows)), assign_labels="discretize", random_state=seed)
    return np.asarray(method.fit(rows).labels_, np.int32)


def refined_similarity(
    centered: Float[Array, "batch features"],
    labels: Int[Array, " batch"],
    halves: tuple[float, float, float],
    width: float,
) -> Guidance:
    """Returns the similarities of rows, with the confidence in each.

    `halves` are the peak of distances and the deviations of the half Gaussians Φ on its sides; the threshold t is
    `width` left deviations below the peak. The weight of a distance d is (Φ(t) − Φ(d)) / Φ(t) below the threshold, by
    the left one, and (Φ(d) − Φ(t)) / (1 − Φ(t)) above it, by the right one; it is 0 for a similar pair of two clusters
    and for another pair of one cluster.
    """
    peak, left, right = halves
    threshold = peak - width * left
    rows = unit_rows(centered)
    distances = 1 - rows @ rows.T

    def share(distance: Float[Array, "..."] | float, deviation: float) -> Float[Array, "..."]:
        return norm.cdf(distance, peak, max(deviation, 1e-8))

    below = 1 - share(distances, left) / share(threshold, left)
    above = 1 - (1 - share(distances, right)) / (1 - share(threshold, right))
    similar = distances <= threshold
    weights = jnp.clip(jnp.where(similar, below, above), 0.0, 1.0)
    agreed = similar == (labels[:, None] == labels)
    return Guidance(jnp.where(similar, 1.0, -1.0), jnp.where(agreed, weights, 0.0))


def consistency_loss(
    logits1: Float[Array, "batch bits"], logits2: Float[Array, "batch bits"], guidance: Sequence[Guidance]
) -> Float[Array, ""]:
    """Returns the mean of w (s − h · h′ / bits)² for relaxed codes h = tanh(logits), plus 0.3 times their contrast.

    The mean is over all pairs of a view, the sum over both views and both parts of the guidance: that of the same view
    and that of the other. The contrast is NT-Xent at temperature 0.5.
    """
    codes1, codes2 = jnp.tanh(logits1), jnp.tanh(logits2)
    cosines = [codes @ codes.T / codes.shape[1] for codes in (codes1, codes2)]
    errors = [jnp.mean(g.weights * jnp.square(g.signs - c)) for g in guidance for c in cosines]
    return sum(errors, 0.3 * nt_xent(codes1, codes2, temperature=0.5))


# OH


class Memory(NamedTuple):
    """What the last steps leave for the next one; the newest rows are the first."""

    encoder: dict[str, Array]
    """Parameters that follow those of the network slowly."""
    overviews: Float[Array, "length wide"]
    bits: Float[Array, "length bits"]
    values: Float[Array, "length wide"]


def overview_hashing(
    views: Float[np.ndarray, "views n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    hidden: int = 1024,
    wide: int = 1024,
    length: int = 4096,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> Network:
    """Returns a network of two layers whose bits say which images of a memory an image takes its real values from.

    Beside the bits, the hidden layer has `wide` real values. Those of the memory are averaged by how many bits are
    equal, and views are to agree in that average: the overview. The memory has the last `length` images, at most half
    of those that train, so that few of them are there with their own overview as a negative. Weights, momentum and
    temperature are those of the published code. CIBHash's head takes the place of the published network, all of which
    is trained at a low learning rate; batches and epochs are those of the other methods.

    References:
      Yu, Shen and Zhang, Hashing one with all, ACM Multimedia 2023 (https://doi.org/10.1145/3581783.3611977).
    """
    validate_views(views, bits)
    init_key, memory_key, train_key = jax.random.split(key, 3)
    mean, scale = center_and_scale(views)
    count, images, width = views.shape
    shapes = {"encode 1": (width, hidden), "encode 2": (hidden, bits), "values": (hidden, wide)}
    params = initial_layers(init_key, shapes)
    length = max(1, min(length, images // 2))
    rows = [
        jax.random.normal(jax.random.fold_in(memory_key, number), (length, numbers))
        for number, numbers in enumerate((wide, bits, wide))
    ]

    def loss_of(
        params: dict[str, Array], memory: Memory, rows: Float[Array, "batch views features"], key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], Memory]:
        first, second = jax.random.choice(key, count, (2,), replace=False)
        rows = (rows - mean) / scale
        return overview_loss(params, memory, rows[:, first], rows[:, second])

    items = jnp.asarray(np.swapaxes(views, 0, 1))
    schedule = Schedule(epochs, batch_size, learning_rate)
    params = minimize_with_memory(params, Memory(params, *rows), loss_of, items, train_key, schedule)
    return Network(mean, scale, {name: array for name, array in params.items() if name.startswith("encode")})


def overview_loss(
    params: dict[str, Array],
    memory: Memory,
    rows1: Float[Array, "batch features"],
    rows2: Float[Array, "batch features"],
) -> tuple[Float[Array, ""], Memory]:
    """Returns the loss of two views, and the memory for the next step.

    It is the sum of two cross-entropies at temperature 0.2. In both, the overview of the first view is to find that of
    the second: as the slow encoder gives it, among the overviews in memory, and as the network itself gives it, with
    the new memory, among those of the batch. Only the first view's overview has a gradient.
    """
    encoder = jax.tree.map(
        lambda slow, fast: 0.999 * slow + 0.001 * jax.lax.stop_gradient(fast), memory.encoder, params
    )
    overview = overviews(*bits_and_values(params, rows1), memory)
    bits, values = bits_and_values(encoder, rows2)
    target = overviews(bits, values, memory)
    likeness = [jnp.sum(overview * target, axis=1, keepdims=True), overview @ memory.overviews.T]
    among_memory = -jax.nn.log_softmax(jnp.concatenate(likeness, axis=1) / 0.2, axis=1)[:, 0]
    memory = Memory(
        encoder,
        *(
            jax.lax.stop_gradient(jnp.concatenate([new, old])[: len(old)])
            for new, old in ((target, memory.overviews), (bits, memory.bits), (values, memory.values))
        ),
    )
    others = jax.lax.stop_gradient(overviews(*bits_and_values(params, rows2), memory))
    among_batch = -jnp.diagonal(jax.nn.log_softmax(overview @ others.T / 0.2, axis=1))
    return jnp.mean(among_memory + among_batch), memory


def bits_and_values(
    params: dict[str, Array], rows: Float[Array, "batch features"]
) -> tuple[Float[Array, "batch bits"], Float[Array, "batch wide"]]:
    """Returns bits, 0 or 1, with the gradient of the sigmoid of their logits, and values of unit length."""
    middle = jax.nn.relu(rows @ params["encode 1"] + params["encode 1 bias"])
    chances = jax.nn.sigmoid(middle @ params["encode 2"] + params["encode 2 bias"])
    bits = chances + jax.lax.stop_gradient((chances > 0.5) - chances)
    return bits, unit_rows(middle @ params["values"] + params["values bias"])


def overviews(
    bits: Float[Array, "batch bits"], values: Float[Array, "batch wide"], memory: Memory
) -> Float[Array, "batch wide"]:
    """Returns averages of the memory's values by the softmax of the shares of equal bits, plus half the own values."""
    equal = (bits @ memory.bits.T + (1 - bits) @ (1 - memory.bits).T) / bits.shape[1]
    return unit_rows(unit_rows(jax.nn.softmax(equal / 0.2, axis=1) @ memory.values) + 0.5 * values)


# Shared


def validate_views(views: Float[np.ndarray, "views n features"], bits: int) -> None:
    """Checks that a baseline can learn `bits` bits from pairs of views."""
    if len(views) < 2:
        raise UserError(f"features must be those of at least 2 views, got shape {list(np.shape(views))}", "features")
    for view in views:
        validate_features(view, bits)
