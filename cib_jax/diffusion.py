"""Diffusion on the neighbour graph of embeddings: how much more likely a random walk links two items than chance does.

An item's nearest neighbours are right more often than items at some distance are, and so are theirs: a walk of several
steps on the graph of neighbours finds what belongs together along the shape of the data, where the cosine of two
embeddings looks along a straight line. Coordinates in which such walks are inner products are diffusion maps (Coifman
and Lafon 2006, https://doi.org/10.1016/j.acha.2006.04.006)."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
from jaxtyping import Float, Float32, Int

from cib_jax.errors import UserError

# diffusion: Diffusion on the neighbour graph of embeddings: how much more likely a random walk links two items than chance does.
#
# An item's nearest neighbours are right more often than items at some distance are, and so are theirs: a walk of several
# steps on the graph of neighbours finds what belongs together along the shape of the data, where the cosine of two
# embeddings looks along a straight line. Coordinates in which such walks are inner products are diffusion maps (Coifman
# and Lafon 2006, https://doi.org/10.1016/j.acha.2006.04.006).


class DiffusionError(UserError, ValueError):
    """Embeddings cannot be made a graph; the message says why."""


BLOCK = 512
"""Items whose similarities to all others are held at a time, by each thread."""

ENOUGH = 1e-4
"""Relative precision of the eigenvalues: far below what another draw of the embeddings changes."""


def neighbours_of(
    embeddings: Float[np.ndarray, "items features"],
    count: int,
    *,
    on_items: Callable[[int], None] = lambda items: None,
) -> tuple[Int[np.ndarray, "items count"], Float32[np.ndarray, "items count"]]:
    """Returns the `count` nearest other items of each item by cosine, in no order, and the cosines.

    Exact, by comparing all pairs: its time grows with the square of the items, its memory with their number.
    `on_items` is told how many more are done.

    Raises:
      DiffusionError: there are not more than `count` items, an embedding is not finite, or one is all zeros.
    """
    items = len(embeddings)
    if not 1 <= count < items:
        raise DiffusionError(f"count: {count} neighbours are wanted of each of {items} items; choose 1 to {items - 1}")
    unit = np.asarray(embeddings, np.float32)
    norms = np.linalg.norm(unit, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        raise DiffusionError("embeddings: some are not finite or all zeros, without a direction; leave those out")
    unit = unit / norms
    found, cosines = np.empty((items, count), np.int32), np.empty((items, count), np.float32)

    def block(start: int) -> None:
        rows = np.arange(start, min(start + BLOCK, items))
        similarity = unit[rows] @ unit.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        chosen = np.argpartition(similarity, items - count, axis=1)[:, items - count :]
        found[rows], cosines[rows] = chosen, np.take_along_axis(similarity, chosen, axis=1)
        on_items(len(rows))

    # Selecting takes longer than the products do, and leaves the interpreter's lock alone.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(block, range(0, items, BLOCK)))
    return found, cosines


def coordinates(
    embeddings: Float[np.ndarray, "items features"],
    *,
    neighbours: int = 20,
    dimensions: int = 50,
    steps: int = 20,
    on_items: Callable[[int], None] = lambda items: None,
) -> Float32[np.ndarray, "items dimensions"]:
    """Returns coordinates whose inner product is p(x, y) / (p(x) p(y)) of a random walk's two ends `steps` apart.

    That is 1 for items that the walk links as often as chance would, more for those that belong together, and never
    less than 0 but for what the cut to `dimensions` changes. The walk goes from an item to one of its neighbours, or to
    one whose neighbour it is, with the probability of their cosine, starting anywhere with the probability that it is
    there after many steps. Items that no walk leaves, such as more than `neighbours` copies of one picture, take a
    dimension of their own; half the dimensions at most go so, to the largest such groups, and those of others are near
    0: no odds of anything.

    Args:
      embeddings: of any length; only their directions count.
      neighbours: of each item in the graph.
      dimensions: how many of the walk's slowest modes are kept, the constant one among them.
      steps: of the walk.
      on_items: told of how many more items the neighbours are known.

    Raises:
      DiffusionError: there are not more than `neighbours` and `dimensions` items, a value is out of range, or an
        embedding has no direction.
    """
    items = len(embeddings)
    if not 2 <= dimensions < items:
        raise DiffusionError(f"dimensions: {dimensions} of a walk on {items} items; choose from 2 to {items - 1}")
    if steps < 1:
        raise DiffusionError(f"steps: {steps} must be 1 or more")
    found, cosines = neighbours_of(embeddings, neighbours, on_items=on_items)
    # Opposite embeddings are linked by next to nothing, but every item keeps a way out.
    weights = np.maximum(cosines.astype(np.float64), 1e-6).ravel()
    places = (np.repeat(np.arange(items), neighbours), found.ravel())
    graph = scipy.sparse.csr_matrix((weights, places), shape=(items, items))
    graph = graph.maximum(graph.T)
    degree = np.asarray(graph.sum(axis=1)).ravel()
    root = np.sqrt(degree / degree.sum())
    scale = scipy.sparse.diags(1 / np.sqrt(degree))
    values, modes = _slowest(scale @ graph @ scale, root, dimensions)
    return (modes / root[:, None] * np.maximum(values, 0) ** (steps / 2)).astype(np.float32)


def _slowest(
    walk: scipy.sparse.csr_matrix, root: Float[np.ndarray, " items"], count: int
) -> tuple[Float[np.ndarray, " count"], Float[np.ndarray, "items count"]]:
    """Returns the largest eigenvalues of the symmetric form of a walk, with their eigenvectors.

    Those of 1 are known, one for each group that no walk leaves. They are taken out first: Lanczos' method, started
    from one vector, sees only one direction of those that share an eigenvalue.
    """
    items = len(root)
    groups, group = scipy.sparse.csgraph.connected_components(walk, directed=False)
    largest = np.argsort(-np.bincount(group), kind="stable")
    places = (np.arange(items), np.argsort(largest, kind="stable")[group])  # the largest first
    known = scipy.sparse.csr_matrix((root, places), shape=(items, groups))
    known = known @ scipy.sparse.diags(1 / np.sqrt(np.asarray(known.power(2).sum(axis=0)).ravel()))

    def step(vector: np.ndarray) -> np.ndarray:
        vector = np.ravel(vector)
        return walk @ vector - known @ (known.T @ vector)

    given = min(groups, max(1, count // 2))
    # Started from a fixed vector, so that the same embeddings give the same coordinates.
    start = np.random.default_rng(0).standard_normal(items)
    rest = scipy.sparse.linalg.LinearOperator((items, items), matvec=step, dtype=np.float64)
    values, modes = scipy.sparse.linalg.eigsh(rest, k=count - given, which="LA", v0=start, tol=ENOUGH)
    order = np.argsort(-values, kind="stable")
    return np.concatenate([np.ones(given), values[order]]), np.hstack([known[:, :given].toarray(), modes[:, order]])


# teacher: What the objective "diffusion" learns from: a teacher of its own, without labels, and how its embeddings are used.


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A head that is trained first, by the contrast of views alone, on real numbers, and then seen as a graph.

    Its embeddings are the logits of the objective "naive_cl"; the walk on the graph of their neighbours
    (`diffusion.coordinates`) says which images belong together. Raises ValueError if a value is out of range.

    Examples:
      >>> import cib_jax as cib
      >>> cib.Teacher(epochs=20).check(images=50_000)
      >>> cib.Teacher(neighbours=20).check(images=10)
      Traceback (most recent call last):
      ValueError: teacher.neighbours: 20 must be less than the 10 training images; lower it
    """

    bits: int = 128
    """Length of an embedding, in real numbers."""
    temperature: float = 0.2
    """τ of its contrast."""
    epochs: int = 0
    """Passes over the training images; 0: as many as the codes take."""
    neighbours: int = 20
    """Of each image in the graph."""
    dimensions: int = 50
    """Of the coordinates: about as many groups of images as can be told apart."""
    steps: int = 20
    """Of the walk."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("neighbours", 1), ("dimensions", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"teacher.{name}: {getattr(self, name)} must be {least} or more")
        if self.bits < 8 or self.bits % 8:
            raise ValueError(f"teacher.bits: {self.bits} must be a multiple of 8, such as 128")
        if not self.temperature > 0:
            raise ValueError(f"teacher.temperature: {self.temperature} must be greater than 0")

    def check(self, images: int) -> None:
        """Checks that so many training images are enough for the graph.

        Raises:
          ValueError: they are not.
        """
        for name in ("neighbours", "dimensions"):
            if getattr(self, name) >= images:
                raise ValueError(
                    f"teacher.{name}: {getattr(self, name)} must be less than the {images} training images; lower it"
                )

    @property
    def method(self) -> dict[str, Any]:
        """The arguments of a training step that are its own."""
        return {"objective": "naive_cl", "temperature": self.temperature}

    @property
    def walk(self) -> dict[str, Any]:
        """The keyword arguments of `diffusion.coordinates`."""
        return {"neighbours": self.neighbours, "dimensions": self.dimensions, "steps": self.steps}
