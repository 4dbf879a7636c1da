"""Linear baselines (LSH, PCA sign, ITQ), and the axes, encoder and checks that other baselines share with them."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, PRNGKeyArray

from cib_jax.errors import UserError

Encoder = Callable[[Float[Array, "batch features"]], Float[Array, "batch bits"]]
"""Map from features to logits. A pytree, so that `jax.jit` accepts it as an argument."""

Fit = Callable[[Float[np.ndarray, "n features"], int, PRNGKeyArray], Encoder]
"""(features of the training images, bits, key) → encoder."""

MAX_SIDE = 16_384
"""Side of the largest matrix that is decomposed (2 GiB)."""

ROUNDING = 1e-12
"""Differences of eigenvalues below this part of the largest one are treated as rounding errors."""


def validate_features(
    features: Float[np.ndarray, "n features"], bits: int, *, most: int | None = None, limit: str = ""
) -> None:
    """Checks that a baseline can learn `bits` bits, at most `most`, from `features`; `limit` says what `most` is."""
    if np.ndim(features) != 2 or 0 in np.shape(features) or len(features) < 2:
        raise UserError(
            f"features must be [n, features] with at least 2 rows, got shape {list(np.shape(features))}", "features"
        )
    dtype = np.dtype(getattr(features, "dtype", np.float64))
    if dtype.kind == "f" and (not dtype.isnative or dtype.itemsize > 8):
        problem = f"features must be in the byte order of this machine and at most float64, got {dtype}"
        raise UserError(f"{problem}; apply .astype('float32')", "features")
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.asarray(features, np.float32)).all()
    if not finite:
        problem = "features must be finite, got values that are NaN, infinite or beyond the range of float32"
        raise UserError(f"{problem}; remove those rows", "features")
    if bits < 1:
        raise UserError(f"bits must be 1 or more, got {bits}", "bits")
    if most is not None and bits > most:
        raise UserError(
            f"bits must be at most {most} ({limit}), got {bits}; choose shorter codes or another method", "bits"
        )


def numpy_generator(key: PRNGKeyArray) -> np.random.Generator:
    """Returns a NumPy generator seeded by a JAX key, for draws on the host."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyperplanes:
    """Linear map of centered features: the encoder of LSH, PCA sign, ITQ, GreedyHash and Bi-half."""

    mean: Float[Array, " features"]
    directions: Float[Array, "features bits"]
    offset: Float[Array, " bits"] | Float[Array, ""] | float = 0.0

    def __call__(self, features: Float[Array | np.ndarray, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns the signed distances to the planes, up to a factor for each plane."""
        # Accelerators multiply float32 with fewer digits by default, which would flip bits near a plane.
        return jnp.matmul(features - self.mean, self.directions, precision="highest") + self.offset


def lsh(features: Float[np.ndarray, "n features"], bits: int, key: PRNGKeyArray) -> Hyperplanes:
    """Returns random hyperplanes through the mean of `features`; only the mean is learned.

    Two points at angle θ, seen from the mean, differ in each bit with probability θ/π.

    References:
      Charikar, Similarity estimation techniques from rounding algorithms, STOC 2002.
    """
    validate_features(features, bits)
    mean = np.mean(features, axis=0, dtype=np.float64)
    return Hyperplanes(jnp.asarray(mean, jnp.float32), jax.random.normal(key, (features.shape[1], bits), jnp.float32))


def pca_sign(features: Float[np.ndarray, "n features"], bits: int, key: PRNGKeyArray) -> Hyperplanes:
    """Returns hyperplanes whose bits are the signs of the first `bits` principal components. Ignores `key`.

    The relaxed solution of unsupervised hashing: uncorrelated, balanced bits of greatest variance.

    References:
      Wang, Kumar and Chang, Semi-supervised hashing for scalable image retrieval, CVPR 2010.
    """
    del key
    validate_features(features, bits, most=np.shape(features)[-1], limit="the number of features")
    principal = principal_axes(features, bits)
    return Hyperplanes(jnp.asarray(principal.mean, jnp.float32), jnp.asarray(principal.axes, jnp.float32))


def itq(
    features: Float[np.ndarray, "n features"], bits: int, key: PRNGKeyArray, *, iterations: int = 50
) -> Hyperplanes:
    """Returns hyperplanes for iterative quantization: principal components, rotated to be close to ±1.

    As published, 50 iterations from a random rotation.

    References:
      Gong and Lazebnik, Iterative quantization: a Procrustean approach to learning binary codes, CVPR 2011
      (TPAMI 2013, section 3.2).
    """
    validate_features(features, bits, most=np.shape(features)[-1], limit="the number of features")
    principal = principal_axes(features, bits)
    start, triangle = np.linalg.qr(numpy_generator(key).normal(size=(bits, bits)))
    # A QR decomposition is unique once its diagonal is positive; LAPACK versions differ in these signs.
    start *= np.where(np.diag(triangle) < 0, -1.0, 1.0)
    rotated = principal.axes @ itq_rotation(principal.project(features), start, iterations)
    return Hyperplanes(jnp.asarray(principal.mean, jnp.float32), jnp.asarray(rotated, jnp.float32))


def itq_rotation(
    projected: Float[np.ndarray, "n bits"], start: Float64[np.ndarray, "bits bits"], iterations: int
) -> Float64[np.ndarray, "bits bits"]:
    """Returns a rotation R that brings V R and sign(V R) closer together at every iteration, starting at `start`.

    Alternates between B = sign(V R) and the R that minimizes ‖B − V R‖ (orthogonal Procrustes).
    """
    rotation = start
    # Where Vᵀ B has less than full rank, the minimum is not unique. The small term selects the rotation nearest to the
    # previous one.
    inertia = ROUNDING * np.square(projected).sum() ** 0.5 * len(projected) ** 0.5
    for _ in range(iterations):
        codes = np.where(projected @ rotation > 0, 1.0, -1.0)
        left, _, right = np.linalg.svd(projected.T @ codes + inertia * rotation)
        rotation = left @ right
    return rotation


class Principal(NamedTuple):
    """Principal axes of features, by decreasing variance."""

    mean: Float64[np.ndarray, " features"]
    axes: Float64[np.ndarray, "features axes"]
    """Orthonormal columns; columns of zeros beyond the rank of the features."""
    variance: Float64[np.ndarray, " axes"]

    def project(self, features: Float[np.ndarray, "n features"]) -> Float64[np.ndarray, "n axes"]:
        """Returns the coordinates of features along the axes."""
        return (features - self.mean) @ self.axes


def principal_axes(features: Float[np.ndarray, "n features"], count: int) -> Principal:
    """Returns the first `count` principal axes, the same on every CPU."""
    n, wide = features.shape
    if min(n, wide) > MAX_SIDE:
        raise UserError(
            f"features must have at most {MAX_SIDE} rows or columns for principal axes, got shape {[n, wide]}; take "
            "fewer training images, or a network with fewer features"
        )
    import sklearn.decomposition  # takes half a second, and LSH does not need it

    mean = np.asarray(np.mean(features, axis=0, dtype=np.float64))
    pca = sklearn.decomposition.PCA(svd_solver="covariance_eigh" if wide <= n else "full")
    with np.errstate(invalid="ignore", divide="ignore"):  # its ratios of variance, if all rows are equal
        pca.fit(features - mean)  # centered here: its covariance loses digits if the mean is large
    variance = pca.explained_variance_ * (n - 1) / n
    # An axis without variance would be an arbitrary one, and its bits would be rounding errors: leave it out.
    rank = int(np.sum(variance > ROUNDING * variance[0]))
    axes = canonical_eigenvectors(variance[:rank], pca.components_[:rank].T, scale=variance[0])[:, :count]
    missing = count - axes.shape[1]
    return Principal(mean, np.pad(axes, ((0, 0), (0, missing))), np.pad(variance[:rank][:count], (0, missing)))


def canonical_eigenvectors(
    values: Float64[np.ndarray, " k"],
    vectors: Float64[np.ndarray, "d k"],
    *,
    scale: float,
    criterion: Float64[np.ndarray, "d d"] | None = None,
) -> Float64[np.ndarray, "d k"]:
    """Returns eigenvectors that depend on the decomposed matrix alone, not on the rounding errors of the solver.

    A solver may return any orthonormal basis of the eigenspace of a multiple eigenvalue, and either sign of every
    vector. Here, eigenvalues that agree up to rounding errors share one eigenspace. Its basis consists of the vectors
    that maximize vᵀ `criterion` v one after the other. Without a criterion, or where that is tied as well, it consists
    of the orthonormalized projections of a fixed random matrix. Signs are such that the largest component is positive.

    Eigenvalues descend. Eigenspaces must not be cut: a caller who needs only some vectors cuts the result. `scale` is
    the norm of the decomposed matrix, to which rounding errors are proportional.
    """
    tolerance = 1e-8 * np.abs(values[1:]) + ROUNDING * scale
    eigenspaces = np.split(vectors, np.flatnonzero(values[:-1] - values[1:] > tolerance) + 1, axis=1)
    vectors = np.concatenate([_canonical_basis(space, criterion) for space in eigenspaces], axis=1)
    # Of several components that are largest up to rounding errors, such as those of (1, −1), the first one counts.
    size = np.abs(vectors)
    largest = np.argmax(size > (1 - 1e-6) * size.max(axis=0), axis=0)
    return vectors * np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)


def _canonical_basis(
    space: Float64[np.ndarray, "d k"], criterion: Float64[np.ndarray, "d d"] | None
) -> Float64[np.ndarray, "d k"]:
    """Returns an orthonormal basis of the space that the columns span, the same (up to signs) for every such matrix."""
    if space.shape[1] <= 1:
        return space
    if criterion is None:
        # The projector space @ space.T does not depend on the basis.
        reference = np.random.default_rng(0).normal(size=space.shape)
        return np.linalg.qr(space @ (space.T @ reference))[0]
    values, rotation = np.linalg.eigh(space.T @ criterion @ space)
    return canonical_eigenvectors(values[::-1], space @ rotation[:, ::-1], scale=float(np.linalg.norm(criterion)))
