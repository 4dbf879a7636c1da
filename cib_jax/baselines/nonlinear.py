"""Nonlinear baselines: spectral hashing, anchor graph hashing and spherical hashing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray

from cib_jax.baselines.linear import canonical_eigenvectors, numpy_generator, principal_axes, validate_features
from cib_jax.errors import UserError

MARGIN = 1e-4
"""Values of eigenfunctions closer to a threshold than this count as below it. Larger than the errors of float32."""

SPHERICAL_SAMPLE = 10_000
"""Largest number of points that spheres are fitted to."""


def _squared_distances(points: Float[Array | np.ndarray, "n d"], others: Float[Array, "m d"]) -> Float[Array, "n m"]:
    product = jnp.matmul(points, others.T, precision="highest")
    return jnp.sum(jnp.square(points), 1, keepdims=True) - 2 * product + jnp.sum(jnp.square(others), 1)


# Spectral hashing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Waves:
    """Encoder of spectral hashing: a cosine along a principal axis for each bit."""

    mean: Float[Array, " features"]
    axes: Float[Array, "features bits"]
    """Axis of each bit; several bits may share one."""
    low: Float[Array, " bits"]
    """Smallest coordinate along the axis, where the wave begins."""
    frequency: Float[Array, " bits"]
    """Radians per unit of the coordinate."""

    def __call__(self, features: Float[Array | np.ndarray, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns the values of the waves."""
        along = jnp.matmul(features - self.mean, self.axes, precision="highest")
        return jnp.cos(self.frequency * (along - self.low))


def spectral(features: Float[np.ndarray, "n features"], bits: int, key: PRNGKeyArray) -> Waves:
    """Returns the smoothest eigenfunctions of features that are assumed to be uniform in a box. Ignores `key`.

    Along principal axis j, which extends from a_j to b_j, the eigenfunctions are cos(kπ (x_j − a_j) / (b_j − a_j)) for
    k = 1, 2, …; the `bits` of lowest frequency are taken over all axes and k. As in the published code, the first
    min(bits, features) axes compete.

    References:
      Weiss, Torralba and Fergus, Spectral hashing, NIPS 2008.
    """
    del key
    validate_features(features, bits)
    principal = principal_axes(features, min(bits, features.shape[1]))
    projected = principal.project(features)
    low, extent = projected.min(axis=0), np.ptp(projected, axis=0)
    if not extent.max() > 0:
        raise UserError("features must have rows that differ, got equal ones only", "features")
    axis, wave = lowest_waves(extent, bits)
    return Waves(
        jnp.asarray(principal.mean, jnp.float32),
        jnp.asarray(principal.axes[:, axis], jnp.float32),
        jnp.asarray(low[axis], jnp.float32),
        jnp.asarray(np.pi * wave / extent[axis], jnp.float32),
    )


def lowest_waves(
    extent: Float64[np.ndarray, " axes"], bits: int
) -> tuple[Int[np.ndarray, " bits"], Int[np.ndarray, " bits"]]:
    """Returns axis and k = 1, 2, … of the `bits` waves of lowest frequency k / extent, ties by axis."""
    # Beyond `bits` half waves along the longest axis, none can be among the lowest; axes without extent have no wave.
    axis, wave = np.repeat(np.flatnonzero(extent), bits), np.tile(np.arange(1, bits + 1), np.count_nonzero(extent))
    frequency = wave / extent[axis]
    ascending = np.argsort(frequency, kind="stable")
    # Frequencies that agree up to rounding errors get one rank, so that the axis decides between them.
    rank = np.empty(len(frequency), int)
    rank[ascending] = np.cumsum(np.diff(frequency[ascending], prepend=0) > 1e-9 * frequency[ascending])
    chosen = np.lexsort((axis, rank))[:bits]
    return axis[chosen], wave[chosen]


# Anchor graph hashing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnchorGraph:
    """Encoder of anchor graph hashing: eigenfunctions of the graph, with one or two bits each."""

    mean: Float[Array, " features"]
    anchors: Float[Array, "anchors features"]
    bandwidth: Float[Array, ""]
    projection: Float[Array, "anchors functions"]
    thresholds: Float[Array, "2 functions"]
    """Thresholds of the second layer, where a function is positive and where it is not."""
    nearest: int = dataclasses.field(metadata={"static": True})
    layers: int = dataclasses.field(metadata={"static": True})

    def weights(self, features: Float[Array | np.ndarray, "batch features"]) -> Float[Array, "batch anchors"]:
        """Returns the weights that tie points to their nearest anchors: 0 for all others, 1 in sum (equation 2)."""
        squared = _squared_distances(features - self.mean, self.anchors)
        negative, which = jax.lax.top_k(-squared, self.nearest)
        kernel = jax.nn.softmax(negative / self.bandwidth, axis=1)
        return jnp.zeros_like(squared).at[jnp.arange(len(squared))[:, None], which].set(kernel)

    def functions(self, features: Float[Array | np.ndarray, "batch features"]) -> Float[Array, "batch functions"]:
        """Returns the eigenfunctions at any points (the Nyström extension, theorem 2)."""
        return jnp.matmul(self.weights(features), self.projection, precision="highest")

    def __call__(self, features: Float[Array | np.ndarray, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns the functions; with two layers, followed by a second bit for each that cuts both of its sides."""
        heights = self.functions(features) - MARGIN
        if self.layers == 1:
            return heights
        above, below = self.thresholds
        return jnp.concatenate([heights, jnp.where(heights > 0, heights - above, below - heights) - MARGIN], axis=1)


def anchor_graph(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    anchors: int = 300,
    nearest: int = 2,
    layers: int = 2,
) -> AnchorGraph:
    """Returns the smoothest eigenfunctions of a neighborhood graph that links points through a few anchors.

    As published, 300 anchors are found by k-means, and each point is tied to its 2 nearest with weights exp(−d² / t),
    where t is the mean squared distance to the second. With two layers (section 3.4, the better variant), half as many
    functions give two bits each.

    References:
      Liu, Wang, Kumar and Chang, Hashing with graphs, ICML 2011.
    """
    anchors = min(anchors, len(features))
    validate_features(features, bits, most=layers * (anchors - 1), limit="functions of this many anchors or rows")
    if layers not in (1, 2) or bits % layers:
        raise UserError(f"layers must be 1, or 2 with an even number of bits, got {layers} with {bits} bits", "layers")
    if not 1 <= nearest <= anchors:
        raise UserError(f"nearest must be between 1 and the number of anchors, {anchors}, got {nearest}", "nearest")
    mean = np.mean(features, axis=0, dtype=np.float64)
    points = features - mean
    seed = int(numpy_generator(key).integers(2**31))
    import sklearn.cluster  # takes half a second, and few baselines need it

    # With several threads the order of sums, and so the last digits, would change from call to call.
    with threadpoolctl.threadpool_limits(1):
        means = sklearn.cluster.KMeans(anchors, n_init=1, max_iter=20, random_state=seed).fit(points)
        squared = np.square(means.transform(points))
    graph = AnchorGraph(
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(means.cluster_centers_, jnp.float32),
        jnp.asarray(max(np.partition(squared, nearest - 1, axis=1)[:, nearest - 1].mean(), 1e-12), jnp.float32),
        jnp.zeros((anchors, bits // layers)),
        jnp.zeros((2, bits // layers)),
        nearest,
        layers,
    )
    weights = np.asarray(graph.weights(jnp.asarray(features, jnp.float32)), np.float64)
    # Sums of exactly 1, which float32 does not give: only then is 1 the eigenvalue of every separate piece.
    weights /= weights.sum(axis=1, keepdims=True)
    projection = anchor_functions(weights, means.cluster_centers_, bits // layers)
    return dataclasses.replace(
        graph,
        projection=jnp.asarray(projection, jnp.float32),
        thresholds=jnp.asarray(_second_layer(weights, weights @ projection - MARGIN), jnp.float32),
    )


def anchor_functions(
    weights: Float64[np.ndarray, "n anchors"], centers: Float64[np.ndarray, "anchors features"], count: int
) -> Float64[np.ndarray, "anchors functions"]:
    """Returns the map from anchor weights to the `count` smoothest eigenfunctions: √n Λ^(−½) V Σ^(−½) (section 3.3).

    V and Σ are eigenvectors and eigenvalues of Λ^(−½) Zᵀ Z Λ^(−½), where Z are the weights and Λ their sums. The paper
    assumes that the graph is connected and drops the first eigenvector, which is the constant function. Clusters that
    are far apart make a graph of several pieces instead. Then the eigenvalue 1 has one eigenvector for each piece, and
    the graph itself cannot say which functions of the pieces are smoother. Therefore

    - the constant function is subtracted by its closed form, √Λ, rather than found among these eigenvectors;
    - of equally smooth functions, those come first that vary most with the position of the anchors (kernel PCA with a
      Gaussian kernel as wide as the mean distance of anchors): they give near pieces similar values.
    """
    degree = weights.sum(axis=0)
    scale = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1e-300)), 0)  # 0 for an anchor without points
    constant = np.sqrt(degree / degree.sum())
    matrix = scale[:, None] * (weights.T @ weights) * scale - np.outer(constant, constant)
    values, vectors = np.linalg.eigh(matrix)
    values, vectors = values[::-1], vectors[:, ::-1]
    if not values[count - 1] > 1e-9:
        raise UserError(
            f"features must give an anchor graph with {count} smooth functions besides the constant, got "
            f"{np.sum(values > 1e-9)}; choose shorter codes or more varied training items"
        )
    squares = np.square(centers).sum(axis=1)
    squared = np.maximum(squares[:, None] - 2 * centers @ centers.T + squares, 0)
    width = max(float(np.square(constant) @ squared @ np.square(constant)), 1e-300)
    kernel = constant[:, None] * np.exp(-squared / width) * constant
    vectors = canonical_eigenvectors(values, vectors, scale=1.0, criterion=kernel)[:, :count]
    return np.sqrt(len(weights)) * scale[:, None] * vectors / np.sqrt(values[:count])


def _second_layer(
    weights: Float64[np.ndarray, "n anchors"], heights: Float64[np.ndarray, "n functions"]
) -> Float64[np.ndarray, "2 functions"]:
    """Returns the thresholds b⁺ and b⁻ that cut the positive side of each function and the other side.

    With z = y − b⁺ on the positive side and z = b⁻ − y on the other, they minimize the cut zᵀ L z of the graph subject
    to balance, 1ᵀ z = 0 (section 3.4). Balance makes b⁻ a linear function of b⁺, and the cut a parabola in b⁺.
    """
    degree = np.maximum(weights.sum(axis=0), 1e-300)
    positive, folded = heights > 0, np.abs(heights)
    n_above, n_below = positive.sum(axis=0), (~positive).sum(axis=0)
    # b⁻ = offset + ratio · b⁺, so z = base + b⁺ · slope.
    offset, ratio = -folded.sum(axis=0) / n_below, n_above / n_below
    base, slope = folded + np.where(positive, 0, offset), np.where(positive, -1.0, ratio)
    # Functions that are constant on each piece of the graph have no cut at all, so that the parabola is flat. The small
    # multiple of the identity then selects the thresholds of least variance, which are the means of the two sides.
    laplacian = (1 + 1e-9) * slope - weights @ ((weights.T @ slope) / degree[:, None])
    above = -np.sum(base * laplacian, axis=0) / np.sum(slope * laplacian, axis=0)
    return np.stack([above, offset + ratio * above])


# Spherical hashing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spheres:
    """Encoder of spherical hashing: a bit says whether a point is inside a sphere."""

    mean: Float[Array, " features"]
    """Subtracted from features and pivots alike, because distances of points far from the origin would lose digits."""
    pivots: Float[Array, "bits features"]
    squared_radii: Float[Array, " bits"]

    def __call__(self, features: Float[Array | np.ndarray, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns squared radius minus squared distance: positive inside a sphere."""
        return self.squared_radii - _squared_distances(features - self.mean, self.pivots)


def spherical(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    mean_tolerance: float = 0.1,
    deviation_tolerance: float = 0.15,
    iterations: int = 300,
) -> Spheres:
    """Returns spheres that contain half of the points each, and a quarter of the points two by two.

    Algorithm 1 of the paper: pivots start at random points. Two spheres that share more than a quarter of the points
    push each other away, two that share less attract each other, until the mean deviation of the overlaps from a
    quarter is at most `mean_tolerance` of it and their standard deviation at most `deviation_tolerance` of it. Codes
    are ranked by Hamming distance, as those of the other baselines, and not by the paper's spherical distance.

    References:
      Heo et al., Spherical hashing, CVPR 2012.
    """
    validate_features(features, bits, most=len(features), limit="the number of training items")
    draws = numpy_generator(key)
    mean = np.mean(features, axis=0, dtype=np.float64)
    sample = draws.choice(len(features), min(SPHERICAL_SAMPLE, len(features)), replace=False)
    points = features[sample] - mean
    starts = points[draws.choice(len(points), bits, replace=False)]
    # Pivots remain linear combinations of the points where they start, so these products give all distances.
    squares, products, gram = np.square(points).sum(axis=1, keepdims=True), points @ starts.T, starts @ starts.T
    pivots = np.eye(bits)  # as coefficients of `starts`
    quarter, middle = len(points) / 4, len(points) // 2
    for iteration in range(iterations + 1):
        distances = squares - 2 * products @ pivots.T + np.sum(pivots @ gram * pivots, axis=1)
        # Between the two middle distances, and a little less: otherwise rounding errors would decide on which side the
        # middle point of an odd number is, or points at equal distances.
        radii = (1 - 1e-9) * np.partition(distances, (middle - 1, middle), axis=0)[middle - 1 : middle + 1].mean(axis=0)
        inside = (distances < radii).astype(np.float32)
        overlap = inside.T @ inside  # counts, which float32 represents exactly
        pairs = overlap[np.triu_indices(bits, 1)]
        if iteration == iterations or bits == 1:
            break
        deviation = np.abs(pairs - quarter).mean()
        if deviation <= mean_tolerance * quarter and pairs.std() <= deviation_tolerance * quarter:
            break
        # The force on pivot i is Σ_j ½ (o_ij − m/4) / (m/4) · (p_i − p_j), divided by the number of spheres.
        force = (overlap - quarter) / quarter / 2
        np.fill_diagonal(force, 0)
        pivots = pivots + (force.sum(axis=1)[:, None] * pivots - force @ pivots) / bits
    return Spheres(
        jnp.asarray(mean, jnp.float32), jnp.asarray(pivots @ starts, jnp.float32), jnp.asarray(radii, jnp.float32)
    )
