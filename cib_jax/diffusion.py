"""Diffusion maps of embeddings, and the teacher whose embeddings the objective "diffusion" uses.

The nearest neighbors of an item belong to its class more often than items at some distance do, and so do their own
nearest neighbors. A random walk of several steps on the graph of neighbors therefore finds what belongs together along
the shape of the data, where the cosine of two embeddings measures along a straight line. Diffusion maps (Coifman and
Lafon 2006, https://doi.org/10.1016/j.acha.2006.04.006) are coordinates in which such walks are inner products.
"""

import concurrent.futures
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from cib_jax.errors import ConfigError, DataError
from cib_jax.files import core_count, import_optional, install_command
from cib_jax.random_streams import stream_rng

BLOCK = 512  # items of which the similarities to all others are in memory at a time, in each thread
ROWS = 8192  # items that are converted or multiplied at a time, where no similarities are in memory

EXACT_ITEMS = 100_000
"""Up to this many items, all pairs are compared; of more, FAISS finds approximate neighbors."""

# How FAISS finds neighbors, measured by benchmarks/graph.py: 96% of the true ones.
COMPONENTS = 128  # principal components in which candidates are found
LISTS = 4  # lists of the inverted file, in square roots of the number of items
PROBES = 32  # lists that are searched for each item
CANDIDATES = 2  # candidates that are compared exactly, in numbers of neighbors
SAMPLE = 20_000  # items of which the principal components are computed

TOLERANCE = 1e-3
"""Largest residual of a mode, weighted as the mode is in the coordinates: far below the change by another draw."""
DEGREE = 10  # of the polynomial of the walk that each round multiplies the modes with
ROUNDS = 6  # at most; two are usual, more where there are many more groups than modes
DENSE_ITEMS = 1000  # up to this many items, all modes are computed

SMALLEST_WEIGHT = 1e-6  # weight of the longest edges, so that a walk can leave every item

TEACHERS = ("", "naive_cl", "cl_hash", "cibhash")
"""Objectives that a teacher can have; "" takes the one that suits its data."""

SCALE_OF = 7  # an item's scale is its distance to the neighbor of this rank, as in the paper of `_local_weights`


def _error(name: str, allowed: str, value: object) -> ConfigError:
    return ConfigError(f"teacher.{name} {allowed}, got {value}", field=f"teacher.{name}")


def load_faiss(items: int) -> Any:
    """Returns the module `faiss`, which finds the neighbors of so many `items`, or raises ConfigError."""
    problem = (
        f"objective 'diffusion' needs the package FAISS for more than {EXACT_ITEMS:,} training items, got {items:,}"
    )
    remedy = f"{install_command('search')}, or train on fewer"
    return import_optional("faiss", ConfigError(f"{problem}; {remedy}", field="objective"))


def validate_item_count(items: int) -> None:
    """Raises ConfigError if the neighbors of so many items can only be found by FAISS, and it is not installed."""
    if items > EXACT_ITEMS:
        load_faiss(items)


def describe_neighbors(items: int) -> str:
    """Returns a sentence on how the neighbors of so many items are found."""
    how = "approximate, by FAISS" if items > EXACT_ITEMS else "exact"
    return f"The nearest neighbors of {items:,} items are {how}"


def nearest_neighbors(
    embeddings: Float[np.ndarray, "items features"],
    count: int,
    *,
    exact_items: int = EXACT_ITEMS,
    on_items: Callable[[int], None] = lambda items: None,
) -> tuple[Int[np.ndarray, "items count"], Float32[np.ndarray, "items count"]]:
    """Returns the `count` nearest other items of each item by cosine, in any order, and the cosines.

    Exact for up to `exact_items`: all pairs are compared, so that time grows with the square of the number of items,
    and memory linearly. Of more, FAISS finds candidates in an inverted file of principal components, of which those
    with the largest cosines are returned: nearly all of the nearest ones, the same in every call, in a time that grows
    with the power 1.5.
    """
    items = len(embeddings)
    if items < 3:
        raise DataError(f"embeddings must be those of 3 items or more, got {items}", field="embeddings")
    if not 1 <= count < items:
        raise _error("neighbours", f"must be from 1 to {items - 1} for {items} items", count)
    embeddings = np.asarray(embeddings, np.float32)
    norms = np.concatenate([np.linalg.norm(embeddings[rows], axis=1, keepdims=True) for rows in _slices(items, ROWS)])
    if not np.isfinite(norms).all() or not norms.all():
        problem = "must be finite and not all zeros, since their direction is compared; remove those items"
        raise DataError(f"embeddings {problem}", field="embeddings")
    find = _exact_neighbors if items <= exact_items else _approximate_neighbors
    return find(embeddings, norms, count, on_items)


def _slices(items: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, items)) for start in range(0, items, size))


def _exact_neighbors(
    embeddings: Float32[np.ndarray, "items features"],
    norms: Float32[np.ndarray, "items 1"],
    count: int,
    on_items: Callable[[int], None],
) -> tuple[Int[np.ndarray, "items count"], Float32[np.ndarray, "items count"]]:
    items, unit = len(embeddings), embeddings / norms
    neighbors, cosines = np.empty((items, count), np.int32), np.empty((items, count), np.float32)

    def block(rows: slice) -> None:
        similarity = unit[rows] @ unit.T
        similarity[np.arange(len(similarity)), np.arange(rows.start, rows.stop)] = -np.inf
        chosen = np.argpartition(similarity, items - count, axis=1)[:, items - count :]
        neighbors[rows], cosines[rows] = chosen, np.take_along_axis(similarity, chosen, axis=1)
        on_items(len(similarity))

    # Threads, because `argpartition` takes longer than the product and releases the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor(core_count()) as pool:
        list(pool.map(block, _slices(items, BLOCK)))
    return neighbors, cosines


def _approximate_neighbors(
    embeddings: Float32[np.ndarray, "items features"],
    norms: Float32[np.ndarray, "items 1"],
    count: int,
    on_items: Callable[[int], None],
) -> tuple[Int[np.ndarray, "items count"], Float32[np.ndarray, "items count"]]:
    faiss = load_faiss(len(embeddings))
    items, width = embeddings.shape
    drawn = stream_rng(0, "neighbor sample").permutation(items)[:SAMPLE]
    sample = embeddings[drawn] / norms[drawn]
    # The largest eigenvalues are the last; not centered, since inner products are compared.
    components = np.linalg.eigh(sample.T @ sample)[1][:, -COMPONENTS:]
    reduced = np.empty((items, min(COMPONENTS, width)), np.float32)
    for rows in _slices(items, ROWS):
        reduced[rows] = embeddings[rows] @ components / norms[rows]
    lists = max(1, min(round(LISTS * math.sqrt(items)), items // 2))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(reduced.shape[1]), reduced.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 0, 1, 64
    index.train(reduced)
    index.add(reduced)
    index.nprobe = PROBES
    neighbors, cosines = np.empty((items, count), np.int32), np.empty((items, count), np.float32)

    def block(rows: slice, found: Int[np.ndarray, "rows candidates"]) -> None:
        chosen_from = embeddings[found] / norms[found]  # -1, where there are too few candidates, is the last item here
        similarity = np.einsum("rf,rcf->rc", embeddings[rows] / norms[rows], chosen_from)
        similarity[(found < 0) | (found == np.arange(rows.start, rows.stop)[:, None])] = -np.inf
        chosen = np.argpartition(similarity, found.shape[1] - count, axis=1)[:, found.shape[1] - count :]
        neighbors[rows] = np.take_along_axis(found, chosen, axis=1)
        cosines[rows] = np.take_along_axis(similarity, chosen, axis=1)
        for item in rows.start + np.flatnonzero(~np.isfinite(cosines[rows]).all(axis=1)):  # rare: its lists are short
            similarity = embeddings @ embeddings[item] / norms[:, 0] / norms[item]
            similarity[item] = -np.inf
            neighbors[item] = np.argpartition(similarity, items - count)[items - count :]
            cosines[item] = similarity[neighbors[item]]
        on_items(rows.stop - rows.start)

    with concurrent.futures.ThreadPoolExecutor(core_count()) as pool:
        for some in _slices(items, ROWS):
            found = index.search(reduced[some], min(CANDIDATES * count + 1, items))[1]
            blocks = [slice(some.start + part.start, some.start + part.stop) for part in _slices(len(found), BLOCK)]
            list(pool.map(block, blocks, (found[part] for part in _slices(len(found), BLOCK))))
    return neighbors, cosines


def join_features(
    items: int, blocks: Iterable[tuple[Float[np.ndarray, "_ bits"], Float[np.ndarray, "_ features"]]]
) -> Float32[np.ndarray, "items joined"]:
    """Returns embeddings of `items` whose cosine is the mean of the cosine of logits and that of centered features.

    Both come in `blocks` of consecutive rows. They are in memory once, within the result.
    """
    blocks = iter(blocks)
    first = next(blocks)
    bits, width = first[0].shape[1], first[1].shape[1]
    joined, total, done = np.empty((items, bits + width), np.float32), np.zeros(width), 0
    for logits, features in itertools.chain([first], blocks):
        rows = slice(done, done + len(logits))
        joined[rows, :bits], joined[rows, bits:] = logits, features
        total += features.sum(axis=0, dtype=np.float64)
        done = rows.stop
    mean = (total / items).astype(np.float32)
    for rows in _slices(items, ROWS):
        joined[rows, bits:] -= mean
        for part in (joined[rows, :bits], joined[rows, bits:]):
            norms = np.linalg.norm(part, axis=1, keepdims=True)
            np.divide(part, np.where(norms > 0, norms, 1), out=part)
    return joined


def walk_coordinates(
    neighbors: Int[np.ndarray, "items count"],
    cosines: Float32[np.ndarray, "items count"],
    *,
    dimensions: int = 200,
    steps: int = 20,
    on_step: Callable[[], None] = lambda: None,
) -> Float32[np.ndarray, "items dimensions"]:
    """Returns coordinates with the inner product p(x, y) / (p(x) p(y)), for the ends x and y of a random walk.

    That ratio is 1 for items that the walk links as often as chance would, larger for items that belong together, and
    0 for items that it never links; the cut to a few dimensions changes it a little, and may make it negative. The walk
    has stationary start, and moves from an item to one of its neighbors, or to an item that it is a neighbor of, with a
    probability that falls with their distance, measured by the distances of their own neighbors.

    A group of items that no walk leaves, such as more copies of one picture than it has neighbors, takes a dimension of
    its own. At most half of the dimensions go to such groups, the largest first; coordinates of the others are near 0.

    Args:
      neighbors: Neighbors of each item, from `nearest_neighbors`.
      cosines: Their cosines.
      dimensions: Number of the slowest modes of the walk that are kept, the constant one included; of n items, at most
        n − 1.
      steps: Number of steps of the walk.
      on_step: Function that is called as long as modes are sought.
    """
    import scipy.sparse  # takes a quarter of a second, which every command would wait for

    items = len(neighbors)
    weights = _local_weights(neighbors, cosines).ravel()
    edges = (np.repeat(np.arange(items), neighbors.shape[1]), neighbors.ravel())
    graph = scipy.sparse.csr_matrix((weights, edges), shape=(items, items))
    graph = graph.maximum(graph.T)
    # The walk's matrix D⁻¹W is similar to the symmetric D^(-1/2) W D^(-1/2), which has orthonormal eigenvectors ψ and
    # the same eigenvalues λ; the coordinates are λ^(steps / 2) ψ / √π, with π the stationary distribution.
    degree = np.asarray(graph.sum(axis=1)).ravel()
    root = np.sqrt(degree / degree.sum())
    scale = scipy.sparse.diags(1 / np.sqrt(degree))
    count = min(dimensions, items - 1)
    values, modes = slowest_modes(scale @ graph @ scale, root, count, steps=steps, on_step=on_step)
    modes *= (np.maximum(values, 0) ** (steps / 2)).astype(np.float32)
    modes /= root[:, None].astype(np.float32)
    return modes


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


def slowest_modes(
    walk: Any,
    root: Float[np.ndarray, " items"],
    count: int,
    *,
    steps: int,
    dense_items: int = DENSE_ITEMS,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Float[np.ndarray, " count"], Float32[np.ndarray, "items count"]]:
    """Returns the largest eigenvalues of the symmetric form of a walk, a sparse matrix, with their eigenvectors.

    The eigenvalue 1 occurs once for each group that no walk leaves, with a known eigenvector. These are deflated first.

    Args:
      walk: Symmetric sparse matrix D^(-1/2) W D^(-1/2), with eigenvalues from -1 to 1.
      root: Square roots of the stationary distribution.
      count: Number of eigenvalues.
      steps: Number of steps of the walk, for which the modes are to be precise: the more, the less the last ones count.
      dense_items: Number of items up to which all modes are computed, by LAPACK.
      on_step: Function that is called after each product of the walk and all modes.
    """
    import scipy.sparse.csgraph

    items = len(root)
    groups, group = scipy.sparse.csgraph.connected_components(walk, directed=False)
    by_size = np.argsort(-np.bincount(group), kind="stable")
    columns = np.argsort(by_size, kind="stable")[group]  # the largest group is column 0
    known = scipy.sparse.csr_matrix((root, (np.arange(items), columns)), shape=(items, groups))
    known = known @ scipy.sparse.diags(1 / np.sqrt(np.asarray(known.power(2).sum(axis=0)).ravel()))
    given = min(groups, max(1, count // 2))
    wanted = count - given
    block = wanted + max(20, wanted // 4)  # more than wanted, so that the last of them converge, too
    if items <= max(dense_items, 2 * block):
        on_step()
        values, modes = np.linalg.eigh(walk.toarray() - (known @ known.T).toarray())
        values, modes = values[::-1], modes[:, ::-1]
    else:
        values, modes = _iterate_subspace(walk, known, wanted, block, steps, on_step)
    whole = np.empty((items, count), np.float32)
    whole[:, :given], whole[:, given:] = known[:, :given].toarray(), modes[:, :wanted]
    return np.concatenate([np.ones(given), values[:wanted]]), whole


def _iterate_subspace(
    walk: Any,
    known: Any,
    wanted: int,
    block: int,
    steps: int,
    on_step: Callable[[], None],
) -> tuple[Float[np.ndarray, " block"], Float32[np.ndarray, "items block"]]:
    """Returns the largest eigenvalues of a walk, and their eigenvectors, orthogonal to the `known` ones.

    Subspace iteration with a Chebyshev filter (Zhou, Saad, Tiago and Chelikowsky 2006,
    https://doi.org/10.1016/j.jcp.2006.03.017): all modes are multiplied at once with a polynomial of the walk that is
    small between -1 and the smallest eigenvalue of the block, and grows steeply beyond. In float32; of the size of all
    modes, two arrays are in memory.
    """
    items = walk.shape[0]
    walk, known = walk.astype(np.float32).tocsr(), known.astype(np.float32).tocsr()
    parts = [(rows, walk[rows]) for rows in _slices(items, ROWS)]
    pool = concurrent.futures.ThreadPoolExecutor(core_count())  # SciPy's products take one thread each

    def multiply(modes: np.ndarray, center: float, factor: float, before: np.ndarray) -> np.ndarray:
        """Returns factor * (walk - center) modes - before, in the memory of `before`."""

        def rows_of(rows: slice, part: Any) -> None:
            product = part @ modes
            product -= np.float32(center) * modes[rows]
            product *= np.float32(factor)
            np.subtract(product, before[rows], out=before[rows])

        list(pool.map(lambda part: rows_of(*part), parts))
        on_step()
        return before

    # A fixed start, so that the same embeddings give the same coordinates.
    modes = stream_rng(0, "diffusion start").standard_normal((items, block), np.float32)
    cut = 0.5
    with pool:
        for _ in range(ROUNDS):
            # Chebyshev's recurrence T_n+1(x) = 2 x T_n(x) - T_n-1(x), with [-1, cut] mapped to [-1, 1].
            center, half = (cut - 1) / 2, (cut + 1) / 2
            before, modes = modes, multiply(modes, center, 1 / half, np.zeros_like(modes))
            for _ in range(DEGREE - 1):
                before, modes = modes, multiply(modes, center, 2 / half, before)
            for _ in range(2):  # twice: rounding errors of the first time grow where modes are nearly parallel
                shares = known.T @ modes
                for rows in _slices(items, ROWS):
                    modes[rows] -= known[rows] @ shares
                _orthonormalize(modes)
            # The eigenvectors within the span of the block (Rayleigh and Ritz).
            before[:] = 0
            product = multiply(modes, 0.0, 1.0, before)
            walked = (modes.T @ product).astype(np.float64)
            values, turn = np.linalg.eigh((walked + walked.T) / 2)
            values, turn = values[::-1], np.ascontiguousarray(turn[:, ::-1], np.float32)
            squares = np.zeros(block)
            for rows in _slices(items, ROWS):
                modes[rows] = modes[rows] @ turn
                squares += np.square(product[rows] @ turn - modes[rows] * values.astype(np.float32)).sum(axis=0)
            if (np.sqrt(squares) * np.maximum(values, 0) ** (steps / 2))[:wanted].max() <= TOLERANCE:
                break
            cut = min(max(float(values[-1]), 0.0), 0.999)
            del before, product
    return values, modes


def _orthonormalize(modes: Float32[np.ndarray, "items block"]) -> None:
    """Replaces modes by an orthonormal basis of their span.

    In float64, though modes are in float32: the filter multiplies the slowest ones so much more than the others that
    all are nearly parallel to them.
    """
    modes /= np.maximum(np.sqrt(np.einsum("ij,ij->j", modes, modes)), np.finfo(np.float32).tiny)
    gram = np.zeros((modes.shape[1],) * 2)
    for rows in _slices(len(modes), ROWS):
        part = modes[rows].astype(np.float64)
        gram += part.T @ part
    squares, turn = np.linalg.eigh(gram)
    turn /= np.sqrt(np.maximum(squares, 1e-13 * squares[-1]))  # a direction of rounding errors alone becomes short
    for rows in _slices(len(modes), ROWS):
        modes[rows] = modes[rows].astype(np.float64) @ turn


STEPS = 3900
"""Steps in which codes learn: on CIFAR-10, ten passes over 50,000 images in batches of 128. A teacher takes twice as
many."""

MOST_EPOCHS = 60


def batches_and_epochs(images: int, batch_size: int = 0, epochs: int = 0) -> tuple[int, int, int]:
    """Returns the batch size, and the epochs of codes and teacher, for a number of training images.

    A batch size or number of epochs that is not 0 stays. The batch size is the power of two nearest to half of the
    square root of the number of images, 64 at least: 128 for 50,000 images, 512 for a million. Epochs are `STEPS`
    steps, `MOST_EPOCHS` at most.
    """
    batch_size = batch_size or min(images, max(64, 2 ** round(math.log2(math.sqrt(images) / 2))))

    def passes(steps: int) -> int:
        return epochs or max(1, min(MOST_EPOCHS, round(steps * batch_size / images)))

    return batch_size, passes(STEPS), passes(2 * STEPS)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Settings of the teacher that the objective "diffusion" learns from: a head that is trained first, without labels.

    It is trained by the contrast of views. The diffusion map of its logits for all training images, beside the features
    of a backbone that is not trained, then gives which images belong together: `coordinates` of the `neighbors`, which
    are the coordinates that `diffusion_match` takes, for any embeddings.

    Raises:
      ConfigError: A value is out of range.

    Examples:
      >>> import cib_jax as cib
      >>> cib.Teacher(neighbours=0)
      Traceback (most recent call last):
      cib_jax.errors.ConfigError: teacher.neighbours must be 1 or more, got 0
    """

    objective: str = ""
    """Its objective; "" takes "naive_cl", and "cibhash" where views are noise on features that are given."""
    bits: int = 128
    """Length of an embedding, in real numbers."""
    temperature: float = 0.2
    """Temperature τ of its contrast."""
    epochs: int = 0
    """Passes over the training images; 0 takes as many as are set for the codes, or as follow from their number."""
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

    def objective_for(self, augment: str) -> str:
        """Returns the objective for a family of views."""
        return self.objective or ("cibhash" if augment == "noise" else "naive_cl")

    def neighbors(
        self, embeddings: Float[np.ndarray, "items features"], on_items: Callable[[int], None] = lambda items: None
    ) -> tuple[Int[np.ndarray, "items count"], Float32[np.ndarray, "items count"]]:
        """Returns the neighbors of all items in the graph, and their cosines.

        Its result is all that `coordinates` needs, so that large embeddings can be deleted in between. Of n items, at
        most n − 1 are neighbors. `on_items` is called with the number of items that are done since the last call.

        Raises:
          ConfigError: There are more than 100,000 items and FAISS is not installed.
          DataError: There are fewer than 3 items, or an embedding is not finite or has no direction.
        """
        return nearest_neighbors(embeddings, min(self.neighbours, len(embeddings) - 1), on_items=on_items)

    def coordinates(
        self,
        neighbors: Int[np.ndarray, "items count"],
        cosines: Float32[np.ndarray, "items count"],
        on_step: Callable[[], None] = lambda: None,
    ) -> Float32[np.ndarray, "items dimensions"]:
        """Returns the diffusion coordinates of all items; `on_step` is called as long as they are sought."""
        return walk_coordinates(neighbors, cosines, dimensions=self.dimensions, steps=self.steps, on_step=on_step)
