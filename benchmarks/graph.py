"""The graph of "diffusion": FAISS's neighbors against exact ones, and the cost of neighbors and modes by items.

`python -m benchmarks.graph compare --features=FILE.npy --logits=FILE.npy --labels=FILE.npy` compares both kinds of
neighbors of the same embeddings: seconds, recall, and the MAP of the walk's inner products. Without files, it draws
50,000 items. `python -m benchmarks.graph cost --items=1000000` measures neighbors and modes of drawn items, with the
peak of memory. `python -m benchmarks.graph draw --items=1000000 --out=FILE.npy` writes features, and their labels
beside them, as the config "features" reads them.
"""

import argparse
import pathlib
import resource
import time
from collections.abc import Iterator

import numpy as np

from benchmarks import measuring, ranking
from cib_jax import diffusion

FEATURES, LATENT, GROUPS, ROWS = 1280, 48, 1000, 8192
QUERIES, DEPTH = 1000, 1000


def draw(items: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of features and their groups: 1,000 Gaussians of a few dimensions, bent, with noise."""
    rng = np.random.default_rng(0)
    # Groups are near one another within 50 larger ones, as classes are.
    centers = rng.standard_normal((50, LATENT)).repeat(GROUPS // 50, axis=0) + rng.standard_normal((GROUPS, LATENT))
    one, other = (rng.standard_normal(shape, np.float32) for shape in ((LATENT, 256), (256, FEATURES)))
    for start in range(0, items, ROWS):
        groups = rng.integers(GROUPS, size=min(ROWS, items - start))
        places = (centers[groups] + rng.standard_normal((len(groups), LATENT))).astype(np.float32)
        features = np.maximum(np.tanh(places @ one / LATENT**0.5) @ other / 256**0.5, 0)
        yield features + 0.1 * rng.standard_normal(features.shape, np.float32), groups


def write(path: pathlib.Path, items: int) -> None:
    """Writes drawn features in float16, and their groups as labels."""
    features, labels = np.lib.format.open_memmap(path, "w+", np.float16, (items, FEATURES)), []
    for start, (block, groups) in zip(range(0, items, ROWS), draw(items), strict=True):
        features[start : start + len(block)] = block
        labels.append(groups)
    np.save(path.with_suffix(".labels.npy"), np.concatenate(labels))


def draw_embeddings(items: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns joined embeddings of drawn features, with a random projection in place of a teacher, and the groups."""
    turn = np.random.default_rng(1).standard_normal((FEATURES, 128), np.float32)
    labels = np.empty(items, np.int64)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, (block, groups) in zip(range(0, items, ROWS), draw(items), strict=True):
            labels[start : start + len(block)] = groups
            yield (block - block.mean(axis=0)) @ turn, block

    return diffusion.join_features(items, blocks()), labels


def mean_average_precision(coordinates: np.ndarray, labels: np.ndarray) -> float:
    """Returns MAP of a sample of items, which rank the others by the walk's inner products."""
    queries = np.random.default_rng(2).choice(len(labels), min(QUERIES, len(labels) // 2), replace=False)
    relevant = []
    for query in queries:
        odds = coordinates @ coordinates[query]
        odds[query] = -np.inf
        relevant.append(labels[ranking.highest(odds, min(DEPTH, len(odds) - 1))] == labels[query])
    return ranking.mean_average_precision(np.array(relevant))


class Clock:
    """Time since it was made, also that of the processor, which other programs on the machine disturb less."""

    def __init__(self) -> None:
        self.begun, self.cpu = time.perf_counter(), time.process_time()

    def __str__(self) -> str:
        return f"{time.perf_counter() - self.begun:.0f} s ({time.process_time() - self.cpu:.0f} s of CPU)"


def peak_gib() -> float:
    """Returns the peak resident memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compare(flags: argparse.Namespace) -> None:
    """Prints seconds, recall and MAP of exact and approximate neighbors."""
    if flags.features:
        features, labels = np.load(flags.features), np.load(flags.labels)
        embeddings = diffusion.join_features(len(features), [(np.load(flags.logits), features)])
    else:
        embeddings, labels = draw_embeddings(flags.items)
    items, rows, exact = len(embeddings), [], np.empty(0)
    for name, limit in (("exact", items), ("FAISS", 1)):
        clock = Clock()
        neighbors, cosines = diffusion.nearest_neighbors(embeddings, 15, exact_items=limit)
        seconds = str(clock)
        exact = neighbors if name == "exact" else exact
        recall = np.mean([len(np.intersect1d(*pair)) for pair in zip(exact, neighbors, strict=True)]) / 15
        clock = Clock()
        walk = diffusion.walk_coordinates(neighbors, cosines)
        rows.append((name, seconds, f"{recall:.3f}", str(clock), f"{mean_average_precision(walk, labels):.4f}"))
    print(f"{items:,} items, {embeddings.shape[1]:,} numbers each, 15 neighbors, 200 modes")
    header = ("neighbors", "time", "recall", "time of modes", f"MAP@{DEPTH} of the walk")
    measuring.print_table(header, rows)


def cost(flags: argparse.Namespace) -> None:
    """Prints seconds of neighbors and modes of drawn items, and the peak of memory."""
    clock, steps = Clock(), []
    embeddings, labels = draw_embeddings(flags.items)
    print(f"{flags.items:,} items drawn in {clock}; {peak_gib():.1f} GiB", flush=True)
    clock = Clock()
    neighbors, cosines = diffusion.nearest_neighbors(embeddings, 15)
    del embeddings
    print(f"{diffusion.describe_neighbors(flags.items)}: {clock}; {peak_gib():.1f} GiB", flush=True)
    clock = Clock()
    walk = diffusion.walk_coordinates(neighbors, cosines, on_step=lambda: steps.append(clock))
    print(f"200 modes: {clock}, {len(steps)} products; {peak_gib():.1f} GiB", flush=True)
    print(f"MAP@{DEPTH} of the walk: {mean_average_precision(walk, labels):.4f}")


def main() -> None:
    """Reads the flags and runs one of the parts."""
    parser = measuring.parser(__doc__, "faiss")
    parser.add_argument("part", choices=["compare", "cost", "draw"])
    parser.add_argument("--out", type=pathlib.Path, default="features.npy", help=".npy file that `draw` writes")
    parser.add_argument("--items", type=int, default=50_000, help="number of drawn items")
    parser.add_argument("--features", help=".npy file of features")
    parser.add_argument("--logits", help=".npy file of a teacher's logits of the same items")
    parser.add_argument("--labels", help=".npy file of their class numbers")
    flags = parser.parse_args()
    print(measuring.machine("numpy", "scipy", "faiss-cpu"), end="\n\n", flush=True)
    if flags.part == "draw":
        write(flags.out, flags.items)
    else:
        {"compare": compare, "cost": cost}[flags.part](flags)


if __name__ == "__main__":
    main()
