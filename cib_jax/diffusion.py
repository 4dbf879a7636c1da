"""Diffusion maps of embeddings, and the teacher whose embeddings the objective "diffusion" uses.

The nearest neighbors of an item belong to its class more often than items at some distance do, and so do their own
nearest neighbors. A random walk of several steps on the graph of neighbors therefore finds what belongs together along
the shape of the data, where the cosine of two embeddings measures along a straight line. Diffusion maps (Coifman and
Lafon 2006, https://doi.org/10.1016/j.acha.2006.04.006) are coordinates in which such walks are inner products.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from cib_jax.errors import ConfigError, DataError
from cib_jax.random_streams import stream_rng

BLOCK = 512  # items of which the similarities to all others are in memory at a time, in each thread

TOLERANCE = 1e-4
"""Relative precision of the eigenvalues: far finer than the change that another draw of the embeddings makes."""

SMALLEST_WEIGHT = 1e-6  # weight of the longest edges, so that a walk can leave every item

TEACHERS = ("", "naive_cl", "cl_hash", "cibhash")
"""Objectives that a teacher can have; "" takes the one that suits its data."""

SCALE_OF = 7  # an item's scale is its distance to the neighbor of this rank, as in the paper of `_local_weights`


def _error(name: str, allowed: str, value: object) -> ConfigError:
    return ConfigError(f"teacher.{name} {allowed}, got {value}", field=f"teacher.{name}")


def nearest_neighbors(
    embeddings: Float[np.ndarray, "items features"], count: int, *, on_items: Callable[[int], None] = lambda items: None
) -> tuple[Int[np.ndarray, "items count"], Float32[np.ndarray, "items count"]]:
    """Returns the `count` nearest other items of each item by cosine, in any order, and the cosines.

    Exact: all pairs are compared, so that time grows with the square of the number of items, and memory linearly.
    """
    items = len(embeddings)
    if not 1 <= count < items:
        raise _error("neighbours", f"must be from 1 to {items - 1} for {items} items", count)
    unit = np.asarray(embeddings, np.float32)
    norms = np.linalg.norm(unit, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        problem = "must be finite and not all zeros, since their direction is compared; remove those items"
        raise DataError(f"embeddings {problem}", field="embeddings")
    unit = unit / norms
    neighbors, cosines = np.empty((items, count), np.int32), np.empty((items, count), np.float32)

    def block(start: int) -> None:
        rows = np.arange(start, min(start + BLOCK, items))
        similarity = unit[rows] @ unit.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        chosen = np.argpartition(similarity, items - count, axis=1)[:, items - count :]
        neighbors[rows], cosines[rows] = chosen, np.take_along_axis(similarity, chosen, axis=1)
        on_items(len(rows))

    # Threads, because `argpartition` takes longer than the product and releases the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(block, range(0, items, BLOCK)))
    return neighbors, cosines


def join_features(
    logits: Float[np.ndarray, "items bits"], features: Float[np.ndarray, "items features"]
) -> Float32[np.ndarray, "items bits+features"]:
    """Returns embeddings whose cosine is the mean of the cosine of `logits` and that of the centered `features`."""
    parts = []
    for part in (logits, features - features.mean(axis=0)):
        norms = np.linalg.norm(part, axis=1, keepdims=True)
        parts.append((part / np.where(norms > 0, norms, 1)).astype(np.float32))
    return np.hstack(parts)


def coordinates(
    embeddings: Float[np.ndarray, "items features"],
    *,
    neighbours: int = 15,
    dimensions: int = 200,
    steps: int = 20,
    on_items: Callable[[int], None] = lambda items: None,
) -> Float32[np.ndarray, "items dimensions"]:
    """Returns coordinates with the inner product p(x, y) / (p(x) p(y)), for the ends x and y of a random walk.

    That ratio is 1 for items that the walk links as often as chance would, larger for items that belong together, and
    0 for items that it never links; the cut to a few dimensions changes it a little, and may make it negative. The walk
    has stationary start, and moves from an item to one of its neighbors, or to an item that it is a neighbor of, with a
    probability that falls with their distance, measured by the distances of their own neighbors.

    A group of items that no walk leaves, such as more than `neighbours` copies of one picture, takes a dimension of its
    own. At most half of the dimensions go to such groups, the largest first; coordinates of the others are near 0.

    Only the directions of the embeddings matter. The `dimensions` slowest modes of the walk are kept, the constant one
    included. Of n items, at most n − 1 are neighbors and n − 1 modes are kept. `on_items` is called with the number of
    items of which the neighbors have been found since the last call, and then with 0 as long as modes are sought.

    Raises:
      ConfigError: `neighbours`, `dimensions` or `steps` is out of range.
      DataError: There are fewer than 3 items, or an embedding is not finite or has no direction.
    """
    import scipy.sparse  # takes a quarter of a second, which every command would wait for

    items = len(embeddings)
    if items < 3:
        raise DataError(f"embeddings must be those of 3 items or more, got {items}", field="embeddings")
    if dimensions < 2:
        raise _error("dimensions", "must be 2 or more", dimensions)
    if steps < 1:
        raise _error("steps", "must be 1 or more", steps)
    neighbors, cosines = nearest_neighbors(embeddings, min(neighbours, items - 1), on_items=on_items)
    weights = _local_weights(neighbors, cosines).ravel()
    edges = (np.repeat(np.arange(items), neighbors.shape[1]), neighbors.ravel())
    graph = scipy.sparse.csr_matrix((weights, edges), shape=(items, items))
    graph = graph.maximum(graph.T)
    # The walk's matrix D⁻¹W is similar to the symmetric D^(-1/2) W D^(-1/2), which has orthonormal eigenvectors ψ and
    # the same eigenvalues λ; the coordinates are λ^(steps / 2) ψ / √π, with π the stationary distribution.
    degree = np.asarray(graph.sum(axis=1)).ravel()
    root = np.sqrt(degree / degree.sum())
    scale = scipy.sparse.diags(1 / np.sqrt(degree))
    values, modes = _slowest_modes(scale @ graph @ scale, root, min(dimensions, items - 1), lambda: on_items(0))
    return (modes / root[:, None] * np.maximum(values, 0) ** (steps / 2)).astype(np.float32)


def _local_weights(
    neighbors: Int[np.ndarray, "items count"], cosines: Float32[np.ndarray, "items count"]
) -> Float[np.ndarray, "items count"]:
    """Returns the weights exp(−d² / (σ_x σ_y)) of edges, with distances d = 1 − cosine and scales σ of both ends.

    An item's scale is the distance to its seventh neighbor, so that an edge is long or short in comparison with others
    nearby (Zelnik-Manor and Perona 2004, https://papers.nips.cc/paper/2619-self-tuning-spectral-clustering).
    """
    distances = np.maximum(1 - cosines.astype(np.float64), 0)
    rank = min(SCALE_OF, distances.shape[1]) - 1
    scale = np.partition(distances, rank, axis=1)[:, rank]
    scales = np.maximum(scale[:, None] * scale[neighbors], np.finfo(np.float32).eps ** 2)
    return np.maximum(np.exp(-(distances**2) / scales), SMALLEST_WEIGHT)


def _slowest_modes(
    walk: Any, root: Float[np.ndarray, " items"], count: int, on_step: Callable[[], None]
) -> tuple[Float[np.ndarray, " count"], Float[np.ndarray, "items count"]]:
    """Returns the largest eigenvalues of the symmetric form of a walk, a sparse matrix, with their eigenvectors.

    The eigenvalue 1 occurs once for each group that no walk leaves, with a known eigenvector. These are deflated first:
    Lanczos' method, started from one vector, finds only one direction of those that share an eigenvalue. `on_step` is
    called at each of its steps.
    """
    import scipy.sparse.csgraph
    import scipy.sparse.linalg

    items = len(root)
    groups, group = scipy.sparse.csgraph.connected_components(walk, directed=False)
    by_size = np.argsort(-np.bincount(group), kind="stable")
    columns = np.argsort(by_size, kind="stable")[group]  # the largest group is column 0
    known = scipy.sparse.csr_matrix((root, (np.arange(items), columns)), shape=(items, groups))
    known = known @ scipy.sparse.diags(1 / np.sqrt(np.asarray(known.power(2).sum(axis=0)).ravel()))

    def deflated(vector: np.ndarray) -> np.ndarray:
        on_step()
        vector = np.ravel(vector)
        return walk @ vector - known @ (known.T @ vector)

    given = min(groups, max(1, count // 2))
    # A fixed start, so that the same embeddings give the same coordinates.
    start = stream_rng(0, "diffusion start").standard_normal(items)
    operator = scipy.sparse.linalg.LinearOperator((items, items), matvec=deflated, dtype=np.float64)
    values, modes = scipy.sparse.linalg.eigsh(operator, k=count - given, which="LA", v0=start, tol=TOLERANCE)
    order = np.argsort(-values, kind="stable")
    return np.concatenate([np.ones(given), values[order]]), np.hstack([known[:, :given].toarray(), modes[:, order]])


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Settings of the teacher that the objective "diffusion" learns from: a head that is trained first, without labels.

    It is trained by the contrast of views. The diffusion map of its logits for all training images, beside the features
    of a backbone that is not trained, then gives which images belong together.

    Raises:
      ConfigError: A value is out of range.

    Examples:
      >>> import cib_jax as cib
      >>> cib.Teacher(neighbours=0)
      Traceback (most recent call last):
      cib_jax.errors.ConfigError: teacher.neighbours must be 1 or more, got 0
    """

    objective: str = ""
    """Its objective; "" takes "naive_cl" for images, and "cibhash" for features that are given."""
    bits: int = 128
    """Length of an embedding, in real numbers."""
    temperature: float = 0.2
    """Temperature τ of its contrast."""
    epochs: int = 0
    """Passes over the training images; 0 takes as many as for the codes."""
    neighbours: int = 15
    """Number of neighbors of each image in the graph."""
    dimensions: int = 200
    """Largest number of coordinates: about as many groups of images as can be told apart."""
    steps: int = 20
    """Number of steps of the walk."""

    def __post_init__(self) -> None:
        if self.objective not in TEACHERS:
            raise _error("objective", f"must be one of {', '.join(map(repr, TEACHERS))}", repr(self.objective))
        for name, least in (("bits", 1), ("epochs", 0), ("neighbours", 1), ("dimensions", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise _error(name, f"must be {least} or more", getattr(self, name))
        if not self.temperature > 0:
            raise _error("temperature", "must be greater than 0", self.temperature)

    def objective_for(self, takes: str) -> str:
        """Returns the objective for a backbone that takes "images" or "features"."""
        return self.objective or ("cibhash" if takes == "features" else "naive_cl")

    def coordinates(
        self,
        logits: Float[np.ndarray, "items bits"],
        features: Float[np.ndarray, "items features"] | None,
        on_items: Callable[[int], None],
    ) -> Float32[np.ndarray, "items dimensions"]:
        """Returns the coordinates of all training images; `features` are None for a backbone that is trained."""
        embeddings = logits if features is None else join_features(logits, features)
        walk = {"neighbours": self.neighbours, "dimensions": self.dimensions, "steps": self.steps}
        return coordinates(embeddings, **walk, on_items=on_items)
