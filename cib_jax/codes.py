"""The three forms of a code and every way between them.

logits (encoder → objective) → ±1 codes (inside a training step) → packed uint8 (everywhere else). Bit j of a code is
bit 7 − j mod 8 of byte j // 8, the order of `numpy.packbits`."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis


@jax.custom_jvp
def _straight_through(probabilities: Array, codes: Array) -> Array:
    """Returns `codes`, exactly, with the derivative of `probabilities`.

    `p + stop_gradient(b − p)` would do the same up to rounding; here a code is ±1 to the last bit.
    """
    return codes


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0].astype(primals[1].dtype)


def binarize(logits: Float[Array, "*batch bits"]) -> Float[Array, "*batch bits"]:
    """Returns the deterministic ±1 codes of test time: +1 where a logit is greater than 0, −1 elsewhere.

    A logit of exactly 0 gives −1: a code never has a third value. No gradient passes.

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
      key: a random key; unused, but asked for, where `stochastic` is False.
      logits: the outputs of the hash head.
      stochastic: True draws each bit as +1 with probability p, the paper's layer; False takes +1 where p > ½, as the
        published code does.
      axis: see `spread`; with one, the logits are [batch, bits].

    Examples:
      >>> import cib_jax as cib
      >>> import jax, jax.numpy as jnp
      >>> key = jax.random.key(0)
      >>> cib.sample_codes(key, jnp.array([20.0, -20.0])).tolist()  # bits that are as good as certain
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


def pack_bits(codes: Float[Array, "*batch bits"]) -> UInt8[Array, "*batch bytes"]:
    """Returns the codes with eight bits to the byte; a bit is 1 where the code is greater than 0.

    Takes ±1 codes, {0, 1} codes, booleans or logits alike.

    Raises:
      ValueError: the number of bits is not a multiple of 8.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> cib.pack_bits(jnp.array([1.0, -1, -1, -1, -1, -1, -1, 1])).tolist()
      [129]
    """
    bits = codes.shape[-1] if codes.ndim else 0
    if bits == 0 or bits % 8:
        raise ValueError(
            f"pack_bits: codes have shape {codes.shape}, but the last axis must be a positive multiple of 8; "
            "choose `bits` as 16, 32, 64, …"
        )
    return jnp.packbits(codes > 0, axis=-1)


def unpack_bits(packed: UInt8[Array, "*batch bytes"]) -> Float[Array, "*batch bits"]:
    """Returns the ±1 codes (float32) that `pack_bits` packed.

    Raises:
      ValueError: `packed` is not uint8.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp
      >>> cib.unpack_bits(jnp.array([129], jnp.uint8)).tolist()
      [1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0]
    """
    if packed.dtype != jnp.uint8:
        raise ValueError(f"unpack_bits: packed codes are uint8, not {packed.dtype}; pass what pack_bits returned")
    # Not jnp.unpackbits, which fails on an empty batch.
    bits = (jnp.asarray(packed)[..., None] >> jnp.arange(7, -1, -1, dtype=jnp.uint8)) & 1
    return bits.reshape(*packed.shape[:-1], packed.shape[-1] * 8).astype(jnp.float32) * 2.0 - 1.0


def ones(packed: UInt8[np.ndarray, "*batch bytes"]) -> UInt8[np.ndarray, "*batch bits"]:
    """Returns the bits that `pack_bits` packed as 0 and 1, in NumPy, for what counts on the host."""
    return np.unpackbits(packed, axis=-1)
