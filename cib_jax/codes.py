"""Conversions between the three forms of a code: logits, ±1 codes and packed bytes.

Logits leave the encoder and enter the loss, ±1 codes exist inside a training step, and packed uint8 are used everywhere
else. Bit j of a code is bit 7 − j mod 8 of byte j // 8, the order of `numpy.packbits`; the rest of the last byte is 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped, UInt8

from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis
from cib_jax.errors import UserError


@jax.custom_jvp
def _straight_through(probabilities: Array, codes: Array) -> Array:
    """Returns `codes` unchanged, with the derivative of `probabilities`.

    The usual `p + stop_gradient(b − p)` has the same derivative, but rounds: its codes are not exactly ±1.
    """
    return codes


@_straight_through.defjvp
def _straight_through_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[1], tangents[0].astype(primals[1].dtype)


@sharding.on_explicit_mesh(rows=True)
def binarize(logits: Float[Array, "*batch bits"]) -> Float[Array, "*batch bits"]:
    """Returns the deterministic ±1 codes of test time: +1 where a logit is greater than 0, else −1.

    A logit of exactly 0 gives −1, so that a code has two values only. No gradient passes; `sample_codes` has one.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> cib.binarize(jnp.array([0.7, 0.0, -2.0])).tolist()
      [1.0, -1.0, -1.0]
    """
    return jnp.where(logits > 0, 1.0, -1.0).astype(logits.dtype)


@sharding.on_explicit_mesh(rows=True)
def sample_codes(
    key: PRNGKeyArray, logits: Float[Array, "*batch bits"], *, stochastic: bool = True, axis: Axis = None
) -> Float[Array, "*batch bits"]:
    """Returns ±1 codes whose gradient passes straight through to p = σ(logits): ∂b/∂p := 1.

    The probabilistic binary layer of CIBHash (https://arxiv.org/abs/2105.06138, section 3.2).

    Args:
      key: Random key; ignored if `stochastic` is False.
      logits: Outputs of the hash head.
      stochastic: Whether each bit is drawn as +1 with probability p, the paper's layer. False takes +1 where p > ½, as
        the published code does.
      axis: Name of the mesh axis over which the batch is divided, inside `jax.shard_map`; the logits are then
        [batch, bits]. The bits do not depend on the number of devices.

    Examples:
      >>> import cib_jax as cib
      >>> import jax, jax.numpy as jnp
      >>> key = jax.random.key(0)
      >>> cib.sample_codes(key, jnp.array([20.0, -20.0])).tolist()  # bits that are almost certain
      [1.0, -1.0]
      >>> jax.grad(lambda logits: cib.sample_codes(key, logits).sum())(jnp.zeros(2)).tolist()  # p (1 - p)
      [0.25, 0.25]
    """
    probabilities = jax.nn.sigmoid(logits)
    if stochastic:
        # In single precision, whatever the logits have: bfloat16 has too few numbers near 0 for rare bits.
        uniform = sharding.draw_sharded(lambda shape: jax.random.uniform(key, shape, jnp.float32), logits.shape, axis)
        chance = jax.nn.sigmoid(logits.astype(jnp.float32))
        codes = jnp.where(uniform < chance, 1.0, -1.0).astype(logits.dtype)
    else:
        codes = binarize(logits)
    return _straight_through(probabilities, codes)


SHORTEST = 16  # bits of the shortest code that training with `nested` fits


def nested_lengths(bits: int) -> list[int]:
    """Returns the lengths of the codes within a nested code of `bits` bits: 16, 32, 64 and so on, and `bits`."""
    return [*(SHORTEST << step for step in range(bits.bit_length()) if SHORTEST << step < bits), bits]


def first_bits(packed: UInt8[np.ndarray, "n bytes"], bits: int) -> UInt8[np.ndarray, "n shorter"]:
    """Returns the first `bits` bits of packed codes, packed."""
    cut = packed[:, : byte_count(bits)].copy()
    cut[:, -1] &= 0xFF << (-bits % 8) & 0xFF  # the rest of the last byte is 0
    return cut


def byte_count(bits: int) -> int:
    """Returns the number of bytes of a packed code."""
    return -(-bits // 8)


@sharding.on_explicit_mesh(rows=True)
def pack_bits(codes: Shaped[Array | np.ndarray, "*batch bits"]) -> UInt8[Array, "*batch bytes"]:
    """Returns codes with eight bits per byte; a bit is 1 where the code is greater than 0.

    Accepts ±1 codes, {0, 1} codes, booleans and logits. If the number of bits is not a multiple of 8, the last byte is
    filled with zeros, which change no Hamming distance.

    Raises:
      ValueError: There are no bits.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> cib.pack_bits(jnp.array([1.0, -1, -1, -1, -1, -1, -1, 1])).tolist()
      [129]
    """
    if not codes.ndim or not codes.shape[-1]:
        raise UserError(f"codes must have at least one bit, got the shape {list(codes.shape)}", field="codes")
    return jnp.packbits(jnp.asarray(codes) > 0, axis=-1)


@sharding.on_explicit_mesh(rows=True)
def unpack_bits(
    packed: UInt8[Array | np.ndarray, "*batch bytes"], bits: int | None = None
) -> Float[Array, "*batch bits"]:
    """Returns the ±1 codes, in float32, of packed codes: the inverse of `pack_bits`.

    Args:
      packed: Packed codes.
      bits: Length of a code; None takes all bits of the bytes.

    Raises:
      ValueError: `packed` is not uint8, or its bytes are not those of so many bits.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> cib.unpack_bits(jnp.array([129], jnp.uint8)).tolist()
      [1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0]
    """
    if packed.dtype != jnp.uint8:
        raise UserError(f"packed codes must be uint8, got {packed.dtype}; pass the result of pack_bits", field="packed")
    if bits is not None and byte_count(bits) != packed.shape[-1]:
        whole = 8 * packed.shape[-1]
        raise UserError(
            f"bits must be from {max(1, whole - 7)} to {whole} for codes of {packed.shape[-1]} bytes, got {bits}",
            field="bits",
        )
    # jnp.unpackbits fails on an empty batch.
    shifts = jnp.arange(7, -1, -1, dtype=jnp.uint8).reshape((1,) * packed.ndim + (8,))
    on = (jnp.asarray(packed)[..., None] >> shifts) & 1
    return on.reshape(*packed.shape[:-1], packed.shape[-1] * 8)[..., :bits].astype(jnp.float32) * 2.0 - 1.0


def ones(packed: UInt8[np.ndarray, "*batch bytes"], bits: int | None = None) -> UInt8[np.ndarray, "*batch bits"]:
    """Returns the bits of packed codes as 0 and 1, in NumPy, for statistics on the host."""
    return np.unpackbits(packed, axis=-1, count=bits)
