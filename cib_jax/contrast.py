"""The sum over all other codes in NT-Xent: at once for small batches, in blocks of rows for large ones."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
