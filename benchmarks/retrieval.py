"""Time, value and memory of MAP of packed codes, against the published code's loop over queries.

`python -m benchmarks.retrieval` uses the sizes of the CIFAR-10 protocol, `--multi-label` those of MSCOCO, `--large` a
million codes; `--memory` adds peak memory, and `--faiss` the search alone against exact search in FAISS.
"""

import functools
import importlib.util
import json
import resource
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

import cib_jax as cib
from benchmarks import measuring


class Task(NamedTuple):
    """Sizes of one search, and the number of queries of the original, from which its time is extrapolated."""

    queries: int
    database: int
    k: int
    classes: int
    multi_label: bool
    originals: int


CIFAR = Task(10_000, 50_000, 1000, 10, False, 10_000)
COCO = Task(5_000, 117_218, 5000, 80, True, 1_000)
LARGE = Task(10_000, 1_000_000, 1000, 10, False, 100)
MEMORY = [(100, 50_000), (1_000, 50_000), (10_000, 50_000), (100, 1_000_000), (1_000, 1_000_000), (100, 4_000_000)]


def make_codes(task: Task, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns packed codes around one center per class, with a quarter of the bits flipped, and labels."""
    generator = np.random.default_rng(0)
    centers = generator.integers(0, 256, (task.classes, bits // 8), np.uint8)
    total = task.queries + task.database
    labels = generator.integers(0, task.classes, total)
    # The AND of two random bytes has each bit set with probability a quarter.
    flips = [generator.integers(0, 256, (total, bits // 8), np.uint8) for _ in range(2)]
    codes = centers[labels] ^ (flips[0] & flips[1])
    if task.multi_label:
        hot = generator.random((total, task.classes)) < 2 / task.classes
        hot[np.arange(total), labels] = True
        labels = hot
    return codes[: task.queries], codes[task.queries :], labels[: task.queries], labels[task.queries :]


def as_original(data: tuple[np.ndarray, ...], classes: int, queries: int) -> tuple[np.ndarray, ...]:
    """Converts data to the types of the published code: ±1 floats and 0/1 labels in float64."""
    codes = [np.unpackbits(part, axis=1).astype(np.float32) * 2 - 1 for part in (data[0][:queries], data[1])]
    labels = [
        part.astype(np.float64) if part.ndim == 2 else np.eye(classes)[part] for part in (data[2][:queries], data[3])
    ]
    return *codes, *labels


def compare(name: str, task: Task, bits: int, rounds: int) -> list[object]:
    """Returns a row of the table."""
    from benchmarks import original

    data = make_codes(task, bits)
    theirs = as_original(data, task.classes, task.originals)
    cib.mean_average_precision(*data, task.k)  # compiles
    loop = functools.partial(original.mean_average_precision, *theirs, task.k)
    taken = measuring.in_turns(
        {"original": loop, "cib_jax": functools.partial(cib.mean_average_precision, *data, task.k)},
        rounds=rounds,
        warm_up=0,
    )
    scale = task.queries / task.originals
    theirs_seconds = measuring.Seconds(tuple(seconds * scale for seconds in taken["original"].rounds))
    some = data[0][: task.originals], data[1], data[2][: task.originals], data[3]
    difference = abs(loop(kind="stable") - cib.mean_average_precision(*some, task.k))
    begun = time.perf_counter()
    cib.evaluate(*data, task.k)
    all_metrics = time.perf_counter() - begun
    return [
        name,
        f"{theirs_seconds.median:.1f}" + ("" if scale == 1 else f" ({task.originals:,} queries × {scale:.0f})"),
        f"{taken['cib_jax'].median:.2f}",
        measuring.format_ratio(theirs_seconds, taken["cib_jax"]),
        f"{difference:.0e}",
        f"{all_metrics:.2f}",
    ]


def compare_search(name: str, task: Task, bits: int, rounds: int) -> list[object]:
    """Returns a row of the table of searches without a metric."""
    import faiss

    queries, database, query_labels, database_labels = make_codes(task, bits)
    queries, query_labels = queries[: task.originals], query_labels[: task.originals]
    index = faiss.IndexBinaryFlat(bits)
    index.use_heap = False  # counting by distance is faster for large k
    index.add(database)
    taken = measuring.in_turns(
        {
            "faiss": lambda: index.search(queries, task.k),
            "cib_jax": lambda: cib.rank(queries, database, task.k),
        },
        rounds=rounds,
    )
    value = cib.mean_average_precision(queries, database, query_labels, database_labels, task.k)
    total = 0.0
    for label, row in zip(query_labels, index.search(queries, task.k)[1], strict=True):
        shared = database_labels[row] == label if label.ndim == 0 else np.any(database_labels[row] & label, axis=1)
        ranks = np.flatnonzero(shared) + 1
        total += float(np.mean(np.arange(1, len(ranks) + 1) / ranks)) if len(ranks) else 0.0
    return [
        f"{name}, {task.originals:,} of its queries",
        f"{taken['faiss'].median:.2f}",
        f"{taken['cib_jax'].median:.2f}",
        measuring.format_ratio(taken["faiss"], taken["cib_jax"]),
        f"{total / task.originals:.5f}",
        f"{value:.5f}",
    ]


def peak(queries: int, database: int) -> dict[str, float]:
    """Returns this process's peak memory in MiB before and after one MAP@1000, and its seconds."""
    data = make_codes(Task(queries, database, 1000, 10, False, 0), 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begun = time.perf_counter()
    cib.mean_average_precision(*data, 1000)
    seconds = time.perf_counter() - begun
    return {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "seconds": seconds}


def print_memory() -> None:
    """Prints peak memory by queries and database, each measured in a new process."""
    rows = []
    for queries, database in MEMORY:
        command = [sys.executable, "-m", "benchmarks.retrieval", "--peak", str(queries), str(database)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        point = json.loads(done.stdout.splitlines()[-1])
        sizes = [f"{queries:,}", f"{database:,}", f"{point['seconds']:.2f}"]
        rows.append(
            [*sizes, *(f"{point[name]:.0f}" for name in ("before", "peak")), f"{queries * database / 2**20:,.0f}"]
        )
    measuring.print_table(
        ["queries", "database", "s with compilation", "MiB before", "peak MiB", "MiB of all distances"], rows
    )


def main() -> None:
    """Reads the flags and prints the tables."""
    parser = measuring.parser("MAP of packed codes.", "torch", "torchvision", "cv2")
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--multi-label", action="store_true", help="5,000 queries on 117,218, 80 classes, MAP@5000")
    parser.add_argument("--large", action="store_true", help="10,000 queries on 1,000,000")
    parser.add_argument("--memory", action="store_true", help="peak memory by queries and database")
    parser.add_argument("--faiss", action="store_true", help="also time the search alone, against FAISS")
    parser.add_argument(
        "--peak", nargs=2, type=int, metavar=("QUERIES", "DATABASE"), help="one point of --memory, as JSON"
    )
    flags = parser.parse_args()
    if flags.faiss and importlib.util.find_spec("faiss") is None:
        parser.error("--faiss needs faiss-cpu: pip install -e '.[benchmark]'")
    if flags.peak:
        print(json.dumps(peak(*flags.peak)))
        return
    print(f"{measuring.machine('jax', 'numpy')}; {flags.bits} bits\n")
    if flags.memory:
        # Measured first, since a child process starts with the peak memory of its parent.
        print_memory()
    tasks = {"10,000 × 50,000, MAP@1000": CIFAR}
    if flags.multi_label:
        tasks["5,000 × 117,218, 80 classes, MAP@5000"] = COCO
    if flags.large:
        tasks["10,000 × 1,000,000, MAP@1000"] = LARGE
    rounds = {name: flags.rounds if task is CIFAR else 1 for name, task in tasks.items()}
    rows = [compare(name, task, flags.bits, rounds[name]) for name, task in tasks.items()]
    header = ["task", "original, s", "cib_jax, s", "times faster", "difference of values", "all metrics at once, s"]
    measuring.print_table(header, rows)
    if flags.faiss:
        rows = [compare_search(name, task, flags.bits, rounds[name]) for name, task in tasks.items()]
        header = [
            "task",
            "FAISS, s",
            "cib_jax, s",
            "times faster",
            "MAP with FAISS's order of ties",
            "with database order",
        ]
        measuring.print_table(header, rows)


if __name__ == "__main__":
    main()
