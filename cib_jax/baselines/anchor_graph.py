"""Anchor graph hashing: the smoothest functions on a neighbourhood graph that goes through a few anchors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jaxtyping import Array, Float, Float64, PRNGKeyArray

from cib_jax.baselines import fitting


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnchorGraph:
    """Eigenfunctions of the graph, and how each gives one bit or two."""

    mean: Float[Array, " features"]
    anchors: Float[Array, "anchors features"]
    bandwidth: Float[Array, ""]
    projection: Float[Array, "anchors functions"]
    thresholds: Float[Array, "2 functions"]
    """Of the second layer's bits, where a function is positive and where it is not."""
    nearest: int = dataclasses.field(metadata={"static": True})
    layers: int = dataclasses.field(metadata={"static": True})

    def weights(self, features: Float[Array, "batch features"]) -> Float[Array, "batch anchors"]:
        """Returns how far each point belongs to each anchor: 0 but for the nearest ones, 1 in sum (equation 2)."""
        centred = features - self.mean
        product = jnp.matmul(centred, self.anchors.T, precision="highest")
        squared = jnp.sum(jnp.square(centred), 1, keepdims=True) - 2 * product + jnp.sum(jnp.square(self.anchors), 1)
        least, which = jax.lax.top_k(-squared, self.nearest)
        kernel = jax.nn.softmax(least / self.bandwidth, axis=1)
        return jnp.zeros_like(squared).at[jnp.arange(len(squared))[:, None], which].set(kernel)

    def functions(self, features: Float[Array, "batch features"]) -> Float[Array, "batch functions"]:
        """Returns the eigenfunctions of points, old and new alike (the Nyström extension, theorem 2)."""
        return jnp.matmul(self.weights(features), self.projection, precision="highest")

    def __call__(self, features: Float[Array, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns the functions; with two layers, beside each a second bit that cuts both of its sides again."""
        heights = self.functions(features)
        if self.layers == 1:
            return heights
        above, below = self.thresholds
        return jnp.concatenate([heights, jnp.where(heights > 0, heights - above, below - heights)], axis=1)


def fit(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    anchors: int = 300,
    nearest: int = 2,
    layers: int = 2,
) -> AnchorGraph:
    """Returns the signs of the smoothest eigenfunctions of an anchor graph.

    Liu, Wang, Kumar and Chang, Hashing with graphs, ICML 2011: 300 anchors by k-means, each point tied to its 2 nearest
    with weights exp(−d² / t), t being the mean of the squared distances to the farther of them. With two layers
    (section 3.4, its better variant), half as many functions give two bits each.

    Args:
      features: of the training images.
      bits: the length of a code; even with two layers.
      key: draws where k-means starts.
      anchors: how many; no more than there are rows.
      nearest: anchors that a point is tied to.
      layers: 1 or 2.

    Raises:
      ValueError: features or bits are malformed, or the graph has fewer smooth functions than are needed.
    """
    anchors = min(anchors, len(features))
    fitting.check(
        features, bits, most=layers * (anchors - 1), why="what a graph of that many anchors, or training items, gives"
    )
    if layers not in (1, 2) or bits % layers or not 1 <= nearest <= anchors:
        raise ValueError(f"layers, nearest: {layers} and {nearest} do not go with {bits} bits and {anchors} anchors")
    mean = np.mean(features, axis=0, dtype=np.float64)
    points = np.asarray(features, np.float32) - mean.astype(np.float32)
    seed = int(fitting.generator(key).integers(2**31))
    import sklearn.cluster  # half a second, which no other method needs

    # In one thread: with more, the order of its sums, and so the last digits, change from call to call.
    with threadpoolctl.threadpool_limits(1):
        means = sklearn.cluster.KMeans(anchors, n_init=1, max_iter=20, random_state=seed).fit(points)
    centres = means.cluster_centers_
    graph = AnchorGraph(
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(centres, jnp.float32),
        jnp.asarray(_bandwidth(points, centres, nearest), jnp.float32),
        jnp.zeros((anchors, bits // layers)),
        jnp.zeros((2, bits // layers)),
        nearest,
        layers,
    )
    weights = np.asarray(graph.weights(jnp.asarray(features, jnp.float32)), np.float64)
    graph = dataclasses.replace(graph, projection=jnp.asarray(_projection(weights, bits // layers), jnp.float32))
    if layers == 1:
        return graph
    heights = weights @ np.asarray(graph.projection, np.float64)
    return dataclasses.replace(graph, thresholds=jnp.asarray(_thresholds(weights, heights), jnp.float32))


def _bandwidth(points: Float[np.ndarray, "n features"], centres: np.ndarray, nearest: int) -> float:
    squared = np.square(points).sum(1, keepdims=True) - 2 * points @ centres.T + np.square(centres).sum(1)
    return max(float(np.partition(squared, nearest - 1, axis=1)[:, nearest - 1].mean()), 1e-12)


def _projection(weights: Float64[np.ndarray, "n anchors"], count: int) -> Float64[np.ndarray, "anchors functions"]:
    """Returns the map from anchor weights to eigenfunctions: √n Λ^(−½) V Σ^(−½) (section 3.3).

    V and Σ are eigenvectors and eigenvalues of Λ^(−½) Zᵀ Z Λ^(−½) but for the constant function's, of eigenvalue 1,
    which is taken out by name: a graph in several pieces has more than one of that eigenvalue.
    """
    degree = weights.sum(axis=0)
    scale = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1e-300)), 0)  # an anchor that nobody is tied to
    constant = np.sqrt(degree / degree.sum())
    matrix = scale[:, None] * (weights.T @ weights) * scale - np.outer(constant, constant)
    values, vectors = np.linalg.eigh(matrix)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    if not values[-1] > 1e-9:
        raise ValueError(
            f"features: their anchor graph has fewer than {count} smooth functions beside the constant; choose shorter "
            "codes or more varied training items"
        )
    largest = vectors[np.argmax(np.abs(vectors), axis=0), np.arange(count)]
    vectors = vectors * np.where(largest < 0, -1.0, 1.0)
    return np.sqrt(len(weights)) * scale[:, None] * vectors / np.sqrt(values)


def _thresholds(
    weights: Float64[np.ndarray, "n anchors"], heights: Float64[np.ndarray, "n functions"]
) -> Float64[np.ndarray, "2 functions"]:
    """Returns where each function's positive side, and its other, are cut again.

    With z = y − b⁺ on the positive side and b⁻ − y on the other, the cut zᵀ L z of the graph is least among the
    balanced ones, 1ᵀ z = 0 (section 3.4): one equation ties b⁻ to b⁺, and in b⁺ the cut is a parabola.
    """
    degree = np.maximum(weights.sum(axis=0), 1e-300)

    def laplacian(z: np.ndarray) -> np.ndarray:
        return z - weights @ ((weights.T @ z) / degree)

    found = np.empty((2, heights.shape[1]))
    for number, height in enumerate(heights.T):
        positive = height > 0
        n_above, n_below = positive.sum(), (~positive).sum()
        if not n_above or not n_below:
            found[:, number] = 0
            continue
        # z = base + b⁺ · slope, once b⁻ is expressed by b⁺.
        folded = np.abs(height)
        below_at_0, below_slope = -folded.sum() / n_below, n_above / n_below
        base = np.where(positive, folded, folded + below_at_0)
        slope = np.where(positive, -1.0, below_slope)
        curvature = slope @ laplacian(slope)
        above = -(base @ laplacian(slope)) / curvature if curvature > 1e-12 else folded[positive].mean()
        found[:, number] = above, below_at_0 + below_slope * above
    return found
