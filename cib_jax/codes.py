"""Conversions between the three forms of a code: logits, ±1 codes and packed bytes.

Logits leave the encoder and enter the loss, ±1 codes exist inside a training step, and packed uint8 are used everywhere
else. Bit j of a code is bit 7 − j mod 8 of byte j // 8, the order of `numpy.packbits`.
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
        uniform = sharding.draw_sharded(lambda shape: jax.random.uniform(key, shape, logits.dtype), logits.shape, axis)
        codes = jnp.where(uniform < probabilities, 1.0, -1.0).astype(logits.dtype)
    else:
        codes = binarize(logits)
    return _straight_through(probabilities, codes)


def pack_bits(codes: Shaped[Array | np.ndarray, "*batch bits"]) -> UInt8[Array, "*batch bytes"]:
    """Returns codes with eight bits per byte; a bit is 1 where the code is greater than 0.

    Accepts ±1 codes, {0, 1} codes, booleans and logits.

    Raises:
      ValueError: The number of bits is not a multiple of 8.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> cib.pack_bits(jnp.array([1.0, -1, -1, -1, -1, -1, -1, 1])).tolist()
      [129]
    """
    bits = codes.shape[-1] if codes.ndim else 0
    if bits == 0 or bits % 8:
        raise UserError(
            f"the last axis of codes must be a positive multiple of 8, got the shape {list(codes.shape)}; "
            "try 16, 32 or 64 bits",
            field="codes",
        )
    return jnp.packbits(jnp.asarray(codes) > 0, axis=-1)


def unpack_bits(packed: UInt8[Array | np.ndarray, "*batch bytes"]) -> Float[Array, "*batch bits"]:
    """Returns the ±1 codes, in float32, of packed codes: the inverse of `pack_bits`.

    Raises:
      ValueError: `packed` is not uint8.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> cib.unpack_bits(jnp.array([129], jnp.uint8)).tolist()
      [1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0]
    """
    if packed.dtype != jnp.uint8:
        raise UserError(f"packed codes must be uint8, got {packed.dtype}; pass the result of pack_bits", field="packed")
    # jnp.unpackbits fails on an empty batch.
    bits = (jnp.asarray(packed)[..., None] >> jnp.arange(7, -1, -1, dtype=jnp.uint8)) & 1
    return bits.reshape(*packed.shape[:-1], packed.shape[-1] * 8).astype(jnp.float32) * 2.0 - 1.0


def ones(packed: UInt8[np.ndarray, "*batch bytes"]) -> UInt8[np.ndarray, "*batch bits"]:
    """Returns the bits of packed codes as 0 and 1, in NumPy, for statistics on the host."""
    return np.unpackbits(packed, axis=-1)
