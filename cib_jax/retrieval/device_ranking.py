"""Ranks and histograms of a block of rows of distances, on an accelerator: what `host_ranking` gives."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, UInt


@functools.partial(jax.jit, static_argnames="k")
def nearest(distances: UInt[Array, "queries n"], k: int) -> Int32[Array, "queries k"]:
    """Returns the positions of each row's k smallest distances, ascending, ties in order of position."""
    positions = jnp.broadcast_to(jnp.arange(distances.shape[1], dtype=jnp.int32), distances.shape)
    return jax.lax.sort((distances, positions), num_keys=1, is_stable=True)[1][:, :k]


@functools.partial(jax.jit, static_argnames="radii")
def histograms(
    distances: UInt[Array, "queries n"], relevance: Bool[Array, "queries n"], radii: int
) -> Int32[Array, "queries 2 radii"]:
    """Returns how many irrelevant, and how many relevant images lie at each distance 0..radii−1 from each query.

    Padding, which is farther than that, falls into a bin of its own, which is left out.
    """
    bins = jnp.where(distances < radii, distances.astype(jnp.int32) + radii * relevance, 2 * radii)
    counts = jax.vmap(lambda row: jnp.bincount(row, length=2 * radii + 1))(bins)
    return counts[:, :-1].reshape(len(distances), 2, radii).astype(jnp.int32)
