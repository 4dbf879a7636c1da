"""Training objectives: NT-Xent on codes, the bottleneck term, and the losses made of them.

CIBHash (https://arxiv.org/abs/2105.06138) minimizes L = L_contrast + β · L_KL (sections 3.2 and 3.3). The objective
"diffusion" replaces the contrast by a target that a teacher has learned, also without labels; see docs/beyond.md.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from cib_jax.codes import nested_lengths, sample_codes
from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis
from cib_jax.errors import UserError

# Default precision rounds the operands to 8 bits of mantissa on TPUs and 10 on GPUs, which moves a loss by a percent.
_exact_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def _product_of_binary(
    rows: Float[Array, "rows bits"], codes: Float[Array, "codes bits"]
) -> Float[Array, "rows codes"]:
    """Returns rows @ codes.T if each row is ±1 times a number: exact in one pass of the matrix units instead of six."""
    return jnp.abs(rows[:, :1]) * jnp.abs(codes[:, 0])[None] * jnp.matmul(jnp.sign(rows), jnp.sign(codes).T)


@_product_of_binary.defjvp
def _product_of_binary_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (rows, codes), (moved_rows, moved_codes) = primals, tangents
    # Differentiated as any other product, and as exactly: the gradients that meet the codes are not ±1.
    tangent = _exact_matmul(moved_rows, codes.T) + _exact_matmul(rows, moved_codes.T)
    return _product_of_binary(rows, codes), tangent


class Objective(NamedTuple):
    """The parts of which an objective is made."""

    binary: bool  # the contrast compares codes, rather than logits
    bottleneck: bool  # β · L_KL is added
    taught: bool = False  # the target comes from a teacher (`Teacher.coordinates`), not from the two views alone
    temperature: float = 0.3  # its τ; 0 follows from the number of groups that the walk finds
    loss: Callable[..., Any] | None = None  # (key, logits1, logits2, **fields) → (loss, terms), in place of all parts


OBJECTIVES = {
    "naive_cl": Objective(binary=False, bottleneck=False),
    "cl_hash": Objective(binary=True, bottleneck=False),
    "cibhash": Objective(binary=True, bottleneck=True),
    "diffusion": Objective(binary=True, bottleneck=True, taught=True, temperature=0.0),
}

OF_ONE_GROUP = 0.4
"""τ of "diffusion" for one group; for more, it falls with their cube root. From validation data: docs/trials.md."""


def is_taught(objective: str | Callable[..., Any]) -> bool:
    """Returns whether an objective, a name or a loss of its own, learns from a teacher."""
    return not callable(objective) and objective in OBJECTIVES and OBJECTIVES[objective].taught


def default_temperature(objective: str | Callable[..., Any]) -> float:
    """Returns the temperature τ of an objective for which none is given: 0.3, or 0 for "diffusion"."""
    return OBJECTIVES["cibhash" if callable(objective) else objective].temperature


@sharding.on_explicit_mesh(rows=False)
def nt_xent(
    codes1: Float[Array, "batch bits"],
    codes2: Float[Array, "batch bits"],
    *,
    temperature: float | Float[Array, ""] = 0.3,
    binary: bool = False,
    axis: Axis = None,
) -> Float[Array, ""]:
    """Returns the normalized-temperature cross-entropy of two views' codes, in nats.

    The mean over the 2 × batch codes of −s(b, pos(b)) + log Σ_{b' ≠ b} exp s(b, b'), where s is the cosine similarity
    divided by `temperature`, pos(b) is the code of the same image's other view, and the sum runs over the
    2 × batch − 1 other codes. Codes may be ±1 or continuous; a code of zeros has similarity 0 to all others. The
    similarities of more than 4,096 codes are computed in blocks of rows, so that memory grows linearly with the batch.

    Args:
      codes1: Codes of the first views.
      codes2: Codes of the second views, in the same order of images.
      temperature: Temperature τ.
      binary: Whether all codes are ±1, of which accelerators compute similarities faster.
      axis: Name of the mesh axis over which the batch is divided, inside `jax.shard_map`. The codes of all devices are
        negatives of each other; the result is this device's share of the loss, and the shares add up to it.

    Raises:
      ValueError: The shapes differ, are not [batch, bits], or hold fewer than 2 images on all devices together.

    References:
      Chen et al. 2020, SimCLR, https://arxiv.org/abs/2002.05709, equation 1; CIBHash, equation 2.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> codes = jnp.array([[1.0, 1.0], [1.0, -1.0]])  # two images, whose views have the same code each
      >>> round(float(cib.nt_xent(codes, codes, temperature=1.0)), 4)  # log(e + 2) - 1
      0.5514
    """
    if codes1.shape != codes2.shape or codes1.ndim != 2 or codes1.shape[0] * sharding.parts(axis) < 2:
        raise UserError(
            "codes1 and codes2 must both be [batch, bits] with at least 2 images, since the contrast needs a negative; "
            f"got {list(codes1.shape)} and {list(codes2.shape)}",
            field="codes1",
        )
    batch = codes1.shape[0]
    codes = _unit(jnp.concatenate([codes1, codes2]))
    everything, place = _of_all_devices(codes, axis)
    log_sums = log_sum_exp_of_others(codes / temperature, everything, place, binary=binary)
    # s(b, pos(b)) is the same number for both views of an image, so it is computed once and counted twice.
    positive = jnp.sum(codes[:batch] * codes[batch:], axis=-1) / temperature
    return (jnp.sum(log_sums) - 2 * jnp.sum(positive)) / len(everything)


def _of_all_devices(
    codes: Float[Array, "views bits"], axis: Axis
) -> tuple[Float[Array, "all_views bits"], Int[Array, " views"]]:
    """Returns the codes of all first views, then those of all second views, and the places of this device's codes."""
    if axis is None:
        return codes, jnp.arange(len(codes))
    batch = len(codes) // 2
    # One exchange for both views.
    views = jax.lax.all_gather(codes.reshape(2, batch, -1), axis, axis=1, tiled=True)
    first = sharding.first_row(batch, axis) + jnp.arange(batch)
    return views.reshape(-1, codes.shape[1]), jnp.concatenate([first, views.shape[1] + first])


def _unit(codes: Float[Array, "codes bits"]) -> Float[Array, "codes bits"]:
    """Returns codes divided by their Euclidean norm; zeros stay zeros."""
    # Division by the largest entry first keeps the squares of large logits from overflowing and of small ones from
    # vanishing. It cancels in the result, so its gradient is not needed. A row of zeros, which has no direction and no
    # derivative, is taken to have the norm 1, so that its gradient is of the size of the others'.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(codes), axis=-1, keepdims=True))
    codes = codes / jnp.where(largest > 0, largest, 1.0)
    return codes * jax.lax.rsqrt(jnp.where(largest > 0, jnp.sum(jnp.square(codes), axis=-1, keepdims=True), 1.0))


MAX_SIMILARITIES = 1 << 24
"""Similarities held in memory at a time, 64 MiB: up to 4,096 codes the whole matrix, which is fastest."""


def log_sum_exp_of_others(
    rows: Float[Array, "rows bits"],
    codes: Float[Array, "codes bits"],
    places: Int[Array, " rows"],
    *,
    binary: bool = False,
    entries: int = MAX_SIMILARITIES,
) -> Float[Array, " rows"]:
    """Returns log Σ_{k ≠ places[i]} exp(rows[i] · codes[k]) for each row i.

    If rows × codes exceeds `entries`, the products are computed in blocks of rows, in the forward pass and again in
    the backward pass, so that memory grows with the number of codes instead of its square. The result is the same up
    to rounding. A row that is not among the codes has the place −1. `binary` rows and codes are each ±1 times a number.
    """
    if len(rows) * len(codes) <= entries:
        return _log_sums(rows, codes, places, binary)[0]
    return _blockwise_log_sums(rows, codes, places, binary, max(1, entries // len(codes)))


def _log_sums(
    rows: Float[Array, "rows bits"], codes: Float[Array, "codes bits"], places: Int[Array, " rows"], binary: bool
) -> tuple[Float[Array, " rows"], Float[Array, "rows codes"]]:
    similarity = _product_of_binary(rows, codes) if binary else _exact_matmul(rows, codes.T)
    others = jnp.where(places[:, None] == jnp.arange(len(codes))[None], -jnp.inf, similarity)
    return jax.nn.logsumexp(others, axis=-1), others


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blockwise_log_sums(
    rows: Float[Array, "rows bits"],
    codes: Float[Array, "codes bits"],
    places: Int[Array, " rows"],
    binary: bool,
    height: int,
) -> Float[Array, " rows"]:
    return _blockwise_forward(rows, codes, places, binary, height)[0]


def _blockwise_forward(
    rows: Array, codes: Array, places: Array, binary: bool, height: int
) -> tuple[Array, tuple[Array, ...]]:
    blocks = _cut(height, rows, places)
    sums = jax.lax.map(lambda block: _log_sums(block[0], codes, block[1], binary)[0], blocks)
    sums = sums.reshape(-1)[: len(rows)]
    return sums, (rows, codes, places, sums)


def _blockwise_backward(
    binary: bool, height: int, residuals: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, None]:
    """Computes ∂row_i = g_i Σ_k P_ik code_k and ∂code_k = Σ_i g_i P_ik row_i; P_ik = exp(row_i · code_k − sum_i)."""
    rows, codes, places, sums = residuals

    def block(codes_gradient: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        block_rows, block_places, block_sums, weight = inputs
        _, others = _log_sums(block_rows, codes, block_places, binary)
        weighted = jnp.exp(others - block_sums[:, None]) * weight[:, None]
        return codes_gradient + _exact_matmul(weighted.T, block_rows), _exact_matmul(weighted, codes)

    blocks = _cut(height, rows, places, sums, gradient)
    codes_gradient, rows_gradient = jax.lax.scan(block, jnp.zeros_like(codes), blocks)
    return rows_gradient.reshape(-1, rows.shape[1])[: len(rows)], codes_gradient, None


_blockwise_log_sums.defvjp(_blockwise_forward, _blockwise_backward)


def _cut(height: int, *arrays: Array) -> tuple[Array, ...]:
    """Returns arrays cut into blocks of `height` rows; the last block is padded with zero rows, which weigh nothing."""
    padding = -len(arrays[0]) % height
    return tuple(
        jnp.pad(array, ((0, padding), *[(0, 0)] * (array.ndim - 1))).reshape(-1, height, *array.shape[1:])
        for array in arrays
    )


@sharding.on_explicit_mesh(rows=False)
def diffusion_match(
    codes1: Float[Array, "batch bits"],
    codes2: Float[Array, "batch bits"],
    coordinates: Float[Array, "batch dimensions"],
    *,
    temperature: float | Float[Array, ""] = 0.0,
    sharpness: float | Float[Array, ""] = 6.0,
    axis: Axis = None,
) -> Float[Array, ""]:
    """Returns the divergence between a teacher's and the codes' similarities of views, in nats, averaged over views.

    For a view v of image i, the target is the distribution p_v(w) ∝ ⟨x_i, x_j⟩^sharpness over the 2 × batch − 1 other
    views w of the batch, with j the image of w, and x the diffusion coordinates: ⟨x_i, x_j⟩ says how much more often
    than by chance a random walk on the teacher's neighbor graph links i and j. The codes give
    q_v(w) = softmax_w(cos(b_v, b_w) / temperature). The result is the mean of KL(p_v ‖ q_v). There are no positives and
    negatives, only a weight for each pair. Where the walk links no two images, the result is that of `nt_xent`.

    Args:
      codes1: Codes of the first views, ±1.
      codes2: Codes of the second views, in the same order of images.
      coordinates: Diffusion coordinates of the images, from `Teacher.coordinates`.
      temperature: Temperature τ of the codes' similarities; 0 takes 0.4 / ∛G, with G = mean ⟨x_i, x_i⟩ over the batch.
        That is the sum of the walk's kept eigenvalues, each to the power of its steps, or how many groups the walk
        finds: more groups need a sharper ranking.
      sharpness: Exponent of the target; 1 takes ⟨x_i, x_j⟩ as it is, more favors the likeliest images.
      axis: Name of the mesh axis over which the batch is divided, with shares of the loss as in `nt_xent`.

    Raises:
      ValueError: The shapes do not fit.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> codes, coordinates = jnp.array([[1.0, 1.0], [1.0, -1.0]]), jnp.eye(2)  # a walk that links no two images
      >>> round(float(cib.diffusion_match(codes, codes, coordinates, temperature=1.0)), 4)  # log(e + 2) - 1
      0.5514
    """
    if codes1.shape != codes2.shape or codes1.ndim != 2 or coordinates.ndim != 2 or len(coordinates) != len(codes1):
        raise UserError(
            "codes1 and codes2 must both be [batch, bits] and coordinates [batch, dimensions] of the same batch; got "
            f"{list(codes1.shape)}, {list(codes2.shape)} and {list(coordinates.shape)}"
        )
    codes, all_coordinates = jnp.concatenate([codes1, codes2]), coordinates
    everything, place = _of_all_devices(codes, axis)
    if axis is not None:
        all_coordinates = jax.lax.all_gather(coordinates, axis, tiled=True)
    # The inner product of coordinates cut to a few dimensions can be negative, which means no link.
    log_ratio = jnp.log(jnp.maximum(_exact_matmul(coordinates, all_coordinates.T), 1e-6))
    itself = place[:, None] == jnp.arange(len(everything))[None]
    # A finite number, so that its product with a weight of 0 is 0.
    log_p = jax.nn.log_softmax(jnp.where(itself, -1e9, jnp.tile(sharpness * log_ratio, (2, 2))), axis=-1)
    groups = jnp.mean(jnp.sum(jnp.square(all_coordinates), axis=-1))
    temperature = jnp.where(temperature > 0, temperature, OF_ONE_GROUP / jnp.cbrt(jnp.maximum(groups, 1)))
    # ±1 codes have norm √bits, so that their cosine is the inner product divided by the number of bits.
    similarity = _product_of_binary(codes, everything) / (codes.shape[1] * temperature)
    log_q = jax.nn.log_softmax(jnp.where(itself, -1e9, similarity), axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q)) / len(everything)


@sharding.on_explicit_mesh(rows=False)
def bernoulli_kl(logits: Float[Array, "batch bits"], target_logits: Float[Array, "batch bits"]) -> Float[Array, ""]:
    """Returns KL(Bernoulli(σ(logits)) ‖ Bernoulli(σ(target_logits))) in nats.

    Summed over bits, averaged over the batch. The bottleneck term of CIBHash (https://arxiv.org/abs/2105.06138,
    section 3.3): its mean is an upper bound on I(B; V1 | V2), the information that the code holds on its view and that
    the other view does not. It does not bound I(B; V1): it is 0 for equal views, whatever their code holds. Computed
    from logits, so that it is finite for every finite input. No gradient flows into `target_logits`.

    Args:
      logits: Logits of the code's bits, given one view.
      target_logits: Logits given the other view, treated as constants.

    Raises:
      ValueError: The shapes differ or are not [batch, bits].

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> half, quarter = jnp.zeros((1, 1)), jnp.full((1, 1), -jnp.log(3.0))  # logits of p = 1/2 and of 1/4
      >>> round(float(cib.bernoulli_kl(half, quarter)), 4)  # (log 2 + log 2/3) / 2
      0.1438
    """
    if logits.shape != target_logits.shape or logits.ndim != 2:
        got = f"{list(logits.shape)} and {list(target_logits.shape)}"
        raise UserError(f"logits and target_logits must both be [batch, bits]; got {got}", field="logits")
    target = jax.lax.stop_gradient(target_logits)
    p = jax.nn.sigmoid(logits)
    # log p − log q as a difference of log-sigmoids: p and q themselves round to 0 or 1 at logits of 20 and more.
    on = jax.nn.log_sigmoid(logits) - jax.nn.log_sigmoid(target)
    off = jax.nn.log_sigmoid(-logits) - jax.nn.log_sigmoid(-target)
    return jnp.mean(jnp.sum(p * on + (1 - p) * off, axis=-1))


@sharding.on_explicit_mesh(rows=False)
def cib_loss(
    key: PRNGKeyArray,
    logits1: Float[Array, "batch bits"],
    logits2: Float[Array, "batch bits"],
    *,
    objective: str | Callable[..., Any] = "cibhash",
    temperature: float | Float[Array, ""] | None = None,
    beta: float | Float[Array, ""] = 0.001,
    stochastic: bool = True,
    coordinates: Float[Array, "batch dimensions"] | None = None,
    sharpness: float | Float[Array, ""] = 6.0,
    nested: bool = False,
    axis: Axis = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss of one batch and its terms {"loss", "contrast", "kl"}, all in nats.

    L = L_contrast + β · ½ [KL(p1 ‖ p2) + KL(p2 ‖ p1)], each KL with its second argument held constant (CIBHash,
    https://arxiv.org/abs/2105.06138, section 3). The KL term is reported for every objective, and added to the loss
    for "cibhash" and "diffusion".

    Args:
      key: Random key, from which each view's bits are drawn independently.
      logits1: Outputs of the hash head for the first views.
      logits2: Outputs for the second views, in the same order of images.
      objective: "naive_cl" (contrast of logits), "cl_hash" (contrast of codes), "cibhash" (contrast of codes and
        bottleneck) or "diffusion" (`diffusion_match`, reported as the contrast, and bottleneck); or a function
        (key, logits1, logits2, **fields) → (loss, terms), which takes the fields that it names of `temperature`,
        `beta`, `stochastic` and `sharpness`. It sees the whole batch, also where devices share it.
      temperature: Temperature τ of the contrast; None takes the objective's, 0.3, or for "diffusion" 0, the one that
        follows from the number of groups.
      beta: Weight β of the bottleneck.
      stochastic: Whether bits are drawn (the paper's layer) or thresholded (the published code's).
      coordinates: Diffusion coordinates of the images, for "diffusion" only.
      sharpness: Exponent of the target of `diffusion_match`, for "diffusion" only.
      nested: Whether the first 16, 32, 64, … bits are to be codes, too: all terms are then means over these lengths and
        all bits, as in Matryoshka representations (Kusupati et al. 2022, https://arxiv.org/abs/2205.13147, equation 1).
      axis: Name of the mesh axis over which the batch is divided. The terms are then this device's shares.

    Raises:
      ValueError: `objective` is unknown, the shapes do not fit, or `coordinates` are missing or not needed.

    Examples:
      >>> import cib_jax as cib
      >>> import jax, jax.numpy as jnp
      >>> logits = jnp.array([[2.0, 2.0], [2.0, -2.0]])
      >>> loss, terms = cib.cib_loss(jax.random.key(0), logits, logits, temperature=1.0, stochastic=False)
      >>> {name: round(float(term), 4) for name, term in sorted(terms.items())}  # equal views: no bottleneck
      {'contrast': 0.5514, 'kl': 0.0, 'loss': 0.5514}
    """
    if not callable(objective) and objective not in OBJECTIVES:
        raise UserError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}", field="objective")
    temperature = default_temperature(objective) if temperature is None else temperature
    if nested:
        fields: dict[str, Any] = {"objective": objective, "temperature": temperature, "beta": beta}
        fields |= {"stochastic": stochastic, "coordinates": coordinates, "sharpness": sharpness, "axis": axis}
        lengths = nested_lengths(logits1.shape[-1])
        # Folded with the length, so that no key is used twice.
        each = [cib_loss(jax.random.fold_in(key, n), logits1[:, :n], logits2[:, :n], **fields)[1] for n in lengths]
        terms = jax.tree.map(lambda *values: sum(values) / len(values), *each)
        return terms["loss"], terms
    own = objective if callable(objective) else OBJECTIVES[objective].loss
    if own is not None:
        fields = {"temperature": temperature, "beta": beta, "stochastic": stochastic, "sharpness": sharpness}
        return _own_loss(own, key, logits1, logits2, fields, axis)
    parts = OBJECTIVES[str(objective)]
    if parts.taught != (coordinates is not None):
        raise UserError(
            f"coordinates must {'' if parts.taught else 'not '}be given for the objective {objective!r}; only the "
            "objective 'diffusion' takes diffusion coordinates of the images",
            field="coordinates",
        )
    compared = (logits1, logits2)
    if parts.binary:
        compared = (
            sample_codes(jax.random.fold_in(key, 1), logits1, stochastic=stochastic, axis=axis),
            sample_codes(jax.random.fold_in(key, 2), logits2, stochastic=stochastic, axis=axis),
        )
    if coordinates is None:
        contrast = nt_xent(*compared, temperature=temperature, binary=parts.binary, axis=axis)
    else:
        contrast = diffusion_match(*compared, coordinates, temperature=temperature, sharpness=sharpness, axis=axis)
    # Divided by the number of devices: `bernoulli_kl` averages over this device's rows only.
    kl = 0.5 * (bernoulli_kl(logits1, logits2) + bernoulli_kl(logits2, logits1)) / sharding.parts(axis)
    loss = contrast + beta * kl if parts.bottleneck else contrast
    return loss, {"loss": loss, "contrast": contrast, "kl": kl}


def _own_loss(
    loss: Callable[..., Any], key: PRNGKeyArray, logits1: Array, logits2: Array, fields: dict[str, Any], axis: Axis
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns this device's share of a function's loss, and of its terms."""
    if axis is not None:
        # Every device computes the loss of the whole batch, so that the function need not know of devices.
        logits1, logits2 = jax.lax.all_gather((logits1, logits2), axis, tiled=True)
    parameters = inspect.signature(loss).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    bound = getattr(loss, "keywords", {})  # of functools.partial
    given = {name: value for name, value in fields.items() if name not in bound and (takes_all or name in parameters)}
    value, terms = loss(key, logits1, logits2, **given)
    terms = terms | {"loss": value}
    for name, term in terms.items():
        if jnp.shape(term) != ():
            raise UserError(f"objective must return numbers, got {name} of shape {list(jnp.shape(term))}", "objective")
    shares = {name: jnp.asarray(term, jnp.float32) / sharding.parts(axis) for name, term in terms.items()}
    return shares["loss"], shares
