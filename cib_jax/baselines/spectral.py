"""Spectral hashing: the smoothest waves along the principal axes, one per bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray

from cib_jax.baselines import fitting, principal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Waves:
    """A cosine per bit, each along one principal axis."""

    mean: Float[Array, " features"]
    axes: Float[Array, "features bits"]
    """The axis of each bit; several bits may share one."""
    low: Float[Array, " bits"]
    """The least coordinate along it, where the wave begins."""
    frequency: Float[Array, " bits"]
    """In radians per unit of the coordinate."""

    def __call__(self, features: Float[Array, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns the height of each bit's wave."""
        along = jnp.matmul(features - self.mean, self.axes, precision="highest")
        return jnp.cos(self.frequency * (along - self.low))


def fit(features: Float[np.ndarray, "n features"], bits: int, key: PRNGKeyArray) -> Waves:
    """Returns the signs of the smoothest eigenfunctions of the features, taken as uniform in a box. `key` is not used.

    Weiss, Torralba and Fergus, Spectral hashing, NIPS 2008: along principal axis j, of extent b_j − a_j, they are
    cos(kπ (x_j − a_j) / (b_j − a_j)) for k = 1, 2, …; of all axes and k, the `bits` of lowest frequency are taken. As
    in the published code, min(bits, features) axes compete.

    Raises:
      ValueError: features or bits are malformed, or all rows are equal.
    """
    del key
    fitting.check(features, bits)
    found = principal.axes(features, min(bits, features.shape[1]))
    projected = found.project(features)
    low, extent = projected.min(axis=0), np.ptp(projected, axis=0)
    if not extent.max() > 0:
        raise ValueError("features: all rows are equal, so no bit can tell them apart")
    axis, wave = lowest_waves(extent, bits)
    return Waves(
        jnp.asarray(found.mean, jnp.float32),
        jnp.asarray(found.axes[:, axis], jnp.float32),
        jnp.asarray(low[axis], jnp.float32),
        jnp.asarray(np.pi * wave / extent[axis], jnp.float32),
    )


def lowest_waves(
    extent: Float64[np.ndarray, " axes"], bits: int
) -> tuple[Int[np.ndarray, " bits"], Int[np.ndarray, " bits"]]:
    """Returns axis and k = 1, 2, … of the `bits` waves of lowest frequency k / extent; of equals, the first axis."""
    # Beyond `bits` half waves along the longest axis, none can be among the lowest; flat axes have no wave at all.
    usable = extent > 1e-6 * extent.max()
    axis, wave = np.divmod(np.arange(len(extent) * bits), bits)
    with np.errstate(divide="ignore"):
        frequency = np.where(usable[axis], (wave + 1) / extent[axis], np.inf)
    chosen = np.argsort(frequency, kind="stable")[:bits]
    return axis[chosen], wave[chosen] + 1
