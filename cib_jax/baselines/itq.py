"""Iterative quantisation: principal components turned so that rounding them to ±1 loses least."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64, PRNGKeyArray

from cib_jax.baselines import fitting, principal
from cib_jax.baselines.hyperplanes import Hyperplanes


def fit(
    features: Float[np.ndarray, "n features"], bits: int, key: PRNGKeyArray, *, iterations: int = 50
) -> Hyperplanes:
    """Returns the signs of rotated principal components.

    Gong and Lazebnik, Iterative quantization: a Procrustean approach to learning binary codes, CVPR 2011 (TPAMI 2013,
    section 3.2), which takes 50 iterations from a random rotation, as here.

    Raises:
      ValueError: features or bits are malformed, or there are fewer features than bits.
    """
    fitting.check(features, bits, most=features.shape[-1], why="the number of features: each bit takes an axis")
    found = principal.axes(features, bits)
    start = np.linalg.qr(fitting.generator(key).normal(size=(bits, bits)))[0]
    turned = found.axes @ rotation(found.project(features), start, iterations)
    return Hyperplanes(jnp.asarray(found.mean, jnp.float32), jnp.asarray(turned, jnp.float32))


def rotation(
    projected: Float64[np.ndarray, "n bits"], start: Float64[np.ndarray, "bits bits"], iterations: int
) -> Float64[np.ndarray, "bits bits"]:
    """Returns the rotation R, from `start` on, that brings sign(V R) and V R nearer to each other at every iteration.

    In turns: B = sign(V R), then the R that minimises ‖B − V R‖ (orthogonal Procrustes).
    """
    turn = start
    for _ in range(iterations):
        codes = np.where(projected @ turn > 0, 1.0, -1.0)
        left, _, right = np.linalg.svd(projected.T @ codes)
        turn = left @ right
    return turn
