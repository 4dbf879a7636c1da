"""Hamming distances between a block of queries and a whole database, in the form that suits the platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt, UInt8, UInt32

# Programs are compiled per shape: a database is filled up to a multiple of this, or of 1/8 to 1/16 of its own size.
_LEAST_QUANTUM = 1 << 12


def as_words(packed: UInt8[np.ndarray, "n bytes"], n: int | None = None) -> UInt32[np.ndarray, "words n"]:
    """Returns rows of bytes as columns of 32-bit words, filled up with zero bits, and with zero columns up to `n`.

    The order of bytes inside a word is the machine's, which XOR, AND and bit counts do not see.
    """
    rows, width = packed.shape
    padded = np.zeros((rows if n is None else n, -(-width // 4) * 4), np.uint8)
    padded[:rows, :width] = packed
    return np.ascontiguousarray(padded.view(np.uint32).T)


def quantum(size: int) -> int:
    """Returns the power of two that the padded size of a database of `size` codes is a multiple of."""
    return max(_LEAST_QUANTUM, 1 << max(0, size.bit_length() - 4))


def padded_size(size: int) -> int:
    """Returns how many codes a database of `size` codes is filled up to."""
    return -(-size // quantum(size)) * quantum(size)


@jax.jit
def hamming(
    queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"], size: int
) -> UInt[Array, "queries n"]:
    """Returns the number of differing bits between every query and every database code.

    Columns from `size` on are padding; they hold the largest value of the type, which no distance reaches. The type
    is uint8 where 32 · words bits leave room for that, uint16 beyond: the narrower, the faster all that follows.
    """
    dtype = jnp.uint8 if 32 * len(database) < np.iinfo(np.uint8).max else jnp.uint16
    found = jax.lax.platform_dependent(
        queries,
        database,
        cpu=functools.partial(by_counting, dtype=dtype),
        default=lambda *codes: by_product(*codes).astype(dtype),
    )
    return jnp.where(jnp.arange(found.shape[1]) < size, found, jnp.iinfo(dtype).max)


def by_counting(
    queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"], dtype: jax.typing.DTypeLike
) -> UInt[Array, "queries n"]:
    """Returns the distances as bit counts of XORs, which a processor's vector unit fuses into one pass."""
    differing = jax.lax.population_count(queries[:, :, None] ^ database[:, None, :])
    return jnp.sum(differing.astype(dtype), axis=0, dtype=dtype)


def by_product(queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"]) -> Int[Array, "queries n"]:
    """Returns the distances as (bits − q · d) / 2 of ±1 codes, one matrix product, exact in integers."""
    product = jax.lax.dot_general(
        _signs(queries), _signs(database), (((0, 2), (0, 2)), ((), ())), preferred_element_type=jnp.int32
    )
    return (32 * len(database) - product) // 2


def _signs(words: UInt32[Array, "words n"]) -> Int[Array, "words n 32"]:
    return 1 - 2 * (words[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1).astype(jnp.int8)
