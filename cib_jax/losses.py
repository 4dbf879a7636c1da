"""The sum over all other codes in NT-Xent: at once for small batches, in blocks of rows for large ones."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from cib_jax.codes import sample_codes
from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis

# contrast: The sum over all other codes in NT-Xent: at once for small batches, in blocks of rows for large ones.

ENTRIES = 1 << 24
"""Similarities held at a time, 64 MiB: up to 4,096 codes the whole matrix, which one product fills fastest."""


def log_sum_exp_of_others(
    rows: Float[Array, "rows bits"],
    codes: Float[Array, "codes bits"],
    places: Int[Array, " rows"],
    *,
    entries: int = ENTRIES,
) -> Float[Array, " rows"]:
    """Returns log Σ_{k ≠ place of the row} exp(row · code_k) for each row.

    Where rows × codes is more than `entries`, the matrix of products is made and used up in blocks of rows, in the
    forward pass and again in the backward one, so that memory grows with the number of codes and not with its square.
    The result is the same up to rounding.

    Args:
      rows: codes that ask, scaled so that a product is a similarity over the temperature.
      codes: all codes, scaled likewise.
      places: where in `codes` each row stands itself; −1 for a row that is not among them.
      entries: how many products may be held at a time.
    """
    if len(rows) * len(codes) <= entries:
        return _at_once(rows, codes, places)[0]
    return _in_blocks(rows, codes, places, max(1, entries // len(codes)))


def _at_once(
    rows: Float[Array, "rows bits"], codes: Float[Array, "codes bits"], places: Int[Array, " rows"]
) -> tuple[Float[Array, " rows"], Float[Array, "rows codes"]]:
    similarity = jnp.matmul(rows, codes.T, precision=jax.lax.Precision.HIGHEST)
    others = jnp.where(places[:, None] == jnp.arange(len(codes)), -jnp.inf, similarity)
    return jax.nn.logsumexp(others, axis=-1), others


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_blocks(
    rows: Float[Array, "rows bits"], codes: Float[Array, "codes bits"], places: Int[Array, " rows"], height: int
) -> Float[Array, " rows"]:
    return _forward(rows, codes, places, height)[0]


def _forward(rows, codes, places, height):
    blocks = _cut(height, rows, places)
    found = jax.lax.map(lambda block: _at_once(block[0], codes, block[1])[0], blocks)
    sums = found.reshape(-1)[: len(rows)]
    return sums, (rows, codes, places, sums)


def _backward(height, kept, gradient):
    """∂/∂row_i = g_i Σ_k P_ik code_k and ∂/∂code_k = Σ_i g_i P_ik row_i, with P_ik = exp(row_i · code_k − sum_i)."""
    rows, codes, places, sums = kept

    def block(of_codes, at):
        some, own, total, weight = at
        _, others = _at_once(some, codes, own)
        share = jnp.exp(others - total[:, None]) * weight[:, None]
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return of_codes + product(share.T, some), product(share, codes)

    cut = _cut(height, rows, places, sums, gradient)
    of_codes, of_rows = jax.lax.scan(block, jnp.zeros_like(codes), cut)
    return of_rows.reshape(-1, rows.shape[1])[: len(rows)], of_codes, None


_in_blocks.defvjp(_forward, _backward)


def _cut(height: int, *arrays: Array) -> tuple[Array, ...]:
    """Returns arrays cut into blocks of `height` rows, the last one filled up with rows of zeros, whose weight is 0."""
    filling = -len(arrays[0]) % height
    return tuple(
        jnp.pad(array, ((0, filling), *[(0, 0)] * (array.ndim - 1))).reshape(-1, height, *array.shape[1:])
        for array in arrays
    )


# objective: What training minimizes: NT-Xent on codes, the KL bottleneck, the paper's three objectives made of them, and ours.
#
# CIBHash, https://arxiv.org/abs/2105.06138: L = L_contrast + β · L_KL (sections 3.2 and 3.3). "diffusion" puts a target
# that is learnt before, without labels, in the place of the contrast; docs/beyond.md says why.


class Objective(NamedTuple):
    """What distinguishes one objective from another."""

    binary: bool
    """Whether codes, not logits, are compared in training."""
    bottleneck: bool
    """Whether β · L_KL is added."""
    taught: bool = False
    """Whether codes learn how alike images are from a teacher's `diffusion.coordinates`, not from their views alone."""


OBJECTIVES = {
    "naive_cl": Objective(binary=False, bottleneck=False),
    "cl_hash": Objective(binary=True, bottleneck=False),
    "cibhash": Objective(binary=True, bottleneck=True),
    "diffusion": Objective(binary=True, bottleneck=True, taught=True),
}


def nt_xent(
    codes1: Float[Array, "batch bits"],
    codes2: Float[Array, "batch bits"],
    *,
    temperature: float = 0.3,
    axis: Axis = None,
) -> Float[Array, ""]:
    """Returns the normalized-temperature cross-entropy of two views' codes, averaged over all 2 × batch codes, in nats.

    Each code must pick its image's other view out of the 2 × batch − 1 codes that are not itself, by cosine similarity
    over `temperature` (SimCLR, https://arxiv.org/abs/2002.05709, equation 1; CIBHash, equation 2). Codes may be ±1 or
    continuous; a code of all zeros has similarity 0 to every other. The similarities of more than 4,096 codes are never
    held all at once (`contrast.log_sum_exp_of_others`).

    With an `axis` (see `spread`), the codes are this device's rows of a larger batch, whose codes are all negatives;
    what is returned is this device's share, and the shares of all devices sum up to the loss.

    Raises:
      ValueError: the two shapes differ, are not [batch, bits], or hold fewer than 2 images.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> codes = jnp.array([[1.0, 1.0], [1.0, -1.0]])  # two images, whose views have the same code each
      >>> round(float(cib.nt_xent(codes, codes, temperature=1.0)), 4)  # log(e + 2) - 1
      0.5514
    """
    if codes1.shape != codes2.shape or codes1.ndim != 2 or codes1.shape[0] < 2:
        raise ValueError(
            f"nt_xent: codes1 {codes1.shape} and codes2 {codes2.shape} must both be [batch, bits] with the same batch "
            "of at least 2 images, since the contrast needs a negative"
        )
    batch = codes1.shape[0]
    codes = jnp.concatenate([codes1, codes2])
    # Scaled by its largest entry first, so that squares of large logits neither overflow nor vanish.
    codes = codes / jnp.maximum(jax.lax.stop_gradient(jnp.max(jnp.abs(codes), axis=-1, keepdims=True)), 1e-12)
    norm_squared = jnp.sum(jnp.square(codes), axis=-1, keepdims=True)
    codes = codes * jax.lax.rsqrt(jnp.maximum(norm_squared, 1e-12))
    if axis is not None or 4 * batch * batch > ENTRIES:
        # Divided by √τ each, so that a product of two is their similarity over τ.
        return _share(codes / jnp.sqrt(temperature), axis)
    similarity = jnp.matmul(codes, codes.T, precision=jax.lax.Precision.HIGHEST) / temperature
    others = jnp.where(jnp.eye(2 * batch, dtype=bool), -jnp.inf, similarity)
    positive = jnp.concatenate([jnp.diagonal(similarity, batch), jnp.diagonal(similarity, -batch)])
    return jnp.mean(jax.nn.logsumexp(others, axis=-1) - positive)


def _share(codes: Float[Array, "2*batch bits"], axis: Axis) -> Float[Array, ""]:
    """Returns the part that these rows have in the mean over all codes of the batch."""
    batch = len(codes) // 2
    everything, place = codes, jnp.arange(2 * batch)
    if axis is not None:
        # Both views in one exchange; then all first views, as without devices, and all second ones.
        views = jax.lax.all_gather(codes.reshape(2, batch, -1), axis, axis=1, tiled=True)
        everything = views.reshape(-1, codes.shape[1])
        first = sharding.first_row(batch, axis) + jnp.arange(batch)
        place = jnp.concatenate([first, views.shape[1] + first])
    sums = log_sum_exp_of_others(codes, everything, place)
    # Both codes of an image have the other as their positive, at the same similarity.
    positive = jnp.sum(codes[:batch] * codes[batch:], axis=-1)
    return (jnp.sum(sums) - 2 * jnp.sum(positive)) / len(everything)


def diffusion_match(
    codes1: Float[Array, "batch bits"],
    codes2: Float[Array, "batch bits"],
    coordinates: Float[Array, "batch dimensions"],
    *,
    temperature: float = 0.2,
    sharpness: float = 6.0,
    axis: Axis = None,
) -> Float[Array, ""]:
    """Returns KL(which images a walk links with one ‖ which codes are like its code), a mean over images, in nats.

    Each code of a first view ranks all codes of second views by softmax(cosine / `temperature`), and each of a second
    those of first ones. What it should give an image is in proportion to (inner product of their coordinates) to the
    power of `sharpness`, that is, to how much more often than by chance a random walk on the neighbor graph links the
    two, sharpened. So there is no positive and no negative, but a weight for every pair; an image's own other view is
    one pair of them.

    Args:
      codes1: of first views, ±1.
      codes2: of second views, image by image.
      coordinates: the images' own, `diffusion.coordinates`.
      temperature: τ.
      sharpness: 1 takes the walk's own odds; more keeps to the likeliest images.
      axis: as in `nt_xent`.

    Raises:
      ValueError: the shapes do not fit.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> codes, coordinates = jnp.array([[1.0, 1.0], [1.0, -1.0]]), jnp.eye(2)  # a walk that links nothing
      >>> round(float(cib.diffusion_match(codes, codes, coordinates, temperature=1.0)), 4)  # log(e + 1) - 1
      0.3133
    """
    if codes1.shape != codes2.shape or codes1.ndim != 2 or coordinates.ndim != 2 or len(coordinates) != len(codes1):
        raise ValueError(
            f"diffusion_match: codes1 {codes1.shape} and codes2 {codes2.shape} must both be [batch, bits], and "
            f"coordinates {coordinates.shape} [batch, dimensions] with the same batch"
        )
    everything = codes1, codes2, coordinates
    if axis is not None:
        everything = jax.lax.all_gather(everything, axis, tiled=True)
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    # An inner product is negative where the cut to a few dimensions made it so: no link at all.
    odds = jnp.log(jnp.maximum(exact(coordinates, everything[2].T), 1e-6))
    target = jax.nn.log_softmax(sharpness * odds, axis=-1)
    scale = codes1.shape[1] * temperature

    def divergence(codes: Array, others: Array) -> Float[Array, ""]:
        found = jax.nn.log_softmax(exact(codes, others.T) / scale, axis=-1)
        return jnp.sum(jnp.exp(target) * (target - found)) / len(others)

    return (divergence(codes1, everything[1]) + divergence(codes2, everything[0])) / 2


def bernoulli_kl(logits: Float[Array, "batch bits"], target_logits: Float[Array, "batch bits"]) -> Float[Array, ""]:
    """Returns KL(Bernoulli(σ(logits)) ‖ Bernoulli(σ(target_logits))), in nats, a sum over bits, a mean over the batch.

    The bottleneck term of CIBHash (section 3.3): an upper bound on I(B, V), what the code holds on the view it was
    computed from. Taken in logits, where it is finite for every finite input. No gradient flows into `target_logits`.

    Raises:
      ValueError: the two shapes differ or are not [batch, bits].

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> half, quarter = jnp.zeros((1, 1)), jnp.full((1, 1), -jnp.log(3.0))  # logits of p = 1/2 and of 1/4
      >>> round(float(cib.bernoulli_kl(half, quarter)), 4)  # (log 2 + log 2/3) / 2
      0.1438
    """
    if logits.shape != target_logits.shape or logits.ndim != 2:
        raise ValueError(
            f"bernoulli_kl: logits {logits.shape} and target_logits {target_logits.shape} must both be [batch, bits]"
        )
    target = jax.lax.stop_gradient(target_logits)
    p = jax.nn.sigmoid(logits)
    on = jax.nn.log_sigmoid(logits) - jax.nn.log_sigmoid(target)
    off = jax.nn.log_sigmoid(-logits) - jax.nn.log_sigmoid(-target)
    return jnp.mean(jnp.sum(p * on + (1 - p) * off, axis=-1))


def cib_loss(
    key: PRNGKeyArray,
    logits1: Float[Array, "batch bits"],
    logits2: Float[Array, "batch bits"],
    *,
    objective: str = "cibhash",
    temperature: float = 0.3,
    beta: float = 0.001,
    stochastic: bool = True,
    coordinates: Float[Array, "batch dimensions"] | None = None,
    sharpness: float = 6.0,
    axis: Axis = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss of one batch and its terms, {"loss", "contrast", "kl"}, all in nats.

    The KL term is reported under every objective and added to the loss, times `beta`, under "cibhash" and "diffusion".

    Args:
      key: a random key; each view draws its bits from a fold of its own.
      logits1: the hash head's outputs for the first views.
      logits2: the same for the second views, image by image.
      objective: "naive_cl" (contrast of the logits), "cl_hash" (contrast of codes), "cibhash" (with bottleneck) or
        "diffusion" (`diffusion_match`, reported as the contrast, with bottleneck).
      temperature: τ of the contrast.
      beta: β, the weight of the bottleneck.
      stochastic: whether bits are drawn (the paper's layer) or thresholded (the published code's).
      coordinates: of the images, for "diffusion".
      sharpness: for "diffusion", see `diffusion_match`.
      axis: see `spread`; with one, the logits are this device's rows, and what is returned are its shares of the terms.

    Raises:
      ValueError: `objective` is none of these, the shapes do not fit, or `coordinates` are missing or of no use.

    Examples:
      >>> import cib_jax as cib
      >>> import jax, jax.numpy as jnp
      >>> logits = jnp.array([[2.0, 2.0], [2.0, -2.0]])
      >>> loss, terms = cib.cib_loss(jax.random.key(0), logits, logits, temperature=1.0, stochastic=False)
      >>> {name: round(float(term), 4) for name, term in sorted(terms.items())}  # both views alike: no bottleneck
      {'contrast': 0.5514, 'kl': 0.0, 'loss': 0.5514}
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: {objective!r} is not one of {', '.join(OBJECTIVES)}")
    chosen = OBJECTIVES[objective]
    if chosen.taught != (coordinates is not None):
        raise ValueError(
            f"coordinates: {objective!r} {'needs' if chosen.taught else 'takes no'} diffusion coordinates of the images"
        )
    compared = (logits1, logits2)
    if chosen.binary:
        compared = (
            sample_codes(jax.random.fold_in(key, 1), logits1, stochastic=stochastic, axis=axis),
            sample_codes(jax.random.fold_in(key, 2), logits2, stochastic=stochastic, axis=axis),
        )
    if coordinates is None:
        contrasted = nt_xent(*compared, temperature=temperature, axis=axis)
    else:
        contrasted = diffusion_match(*compared, coordinates, temperature=temperature, sharpness=sharpness, axis=axis)
    kl = 0.5 * (bernoulli_kl(logits1, logits2) + bernoulli_kl(logits2, logits1)) / sharding.parts(axis)
    loss = contrasted + beta * kl if chosen.bottleneck else contrasted
    return loss, {"loss": loss, "contrast": contrasted, "kl": kl}
