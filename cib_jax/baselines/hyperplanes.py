"""Codes by hyperplanes: one per bit, and a bit says on which side a point lies."""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyperplanes:
    """Logits by a linear map of centred features: encoder of LSH, PCA sign, ITQ and the linear deep baselines."""

    mean: Float[Array, " features"]
    directions: Float[Array, "features bits"]
    offset: Float[Array, " bits"] | float = 0.0

    def __call__(self, features: Float[Array, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns the signed distances to the planes, up to each plane's scale."""
        # In full float32: on accelerators, products default to fewer digits, which turns bits.
        return jax.numpy.matmul(features - self.mean, self.directions, precision="highest") + self.offset
