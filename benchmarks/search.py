"""Search of packed codes: `Index` against FAISS alone; time, its growth, memory, and recall of approximate kinds.

`python -m benchmarks.search` measures a million codes, `--growth` exact search of up to 16 million, `--approximate` the
other kinds at 10 million (`--size`), `--groups` near-duplicates, `--rerank` the gain of ranking the first hits by
logits, `--table` a million photos in a table on disk, `--memory 100000000` the peak memory of an index of that size.
"""

import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

import cib_jax as cib
from benchmarks import growth, measuring, ranking

QUERIES = 200
# For millions of codes; smaller databases use the defaults of each kind.
SETTINGS: list[tuple[str, dict[str, int]]] = [
    ("ivf", {"nlist": 4096, "nprobe": 16}),
    ("ivf", {"nlist": 4096, "nprobe": 64}),
    ("ivf", {"nlist": 1024, "nprobe": 128}),
    ("mih", {"nhash": 2, "b": 22, "nflip": 2}),
    ("mih", {"nhash": 3, "b": 21, "nflip": 1}),
    ("mih", {"nhash": 2, "b": 24, "nflip": 3}),
]


def uniform(n: int, bits: int, seed: int = 0) -> np.ndarray:
    """Returns codes without structure, the hardest case for approximate search."""
    return np.random.default_rng(seed).integers(0, 256, (n, bits // 8), np.uint8)


def clustered(n: int, bits: int, seed: int = 0) -> np.ndarray:
    """Returns codes like those of a hash head: signs of projections of features that cluster around 1,000 centers.

    Features have 24 dimensions, with equal variance between and within clusters.
    """
    shared = np.random.default_rng(1)
    centers = shared.normal(size=(1000, 24)).astype(np.float32)
    directions = shared.normal(size=(24, bits)).astype(np.float32)
    generator, codes = np.random.default_rng(seed), np.empty((n, bits // 8), np.uint8)
    for start in range(0, n, 1 << 17):
        count = min(1 << 17, n - start)
        features = centers[generator.integers(0, 1000, count)]
        features += generator.standard_normal(features.shape, np.float32)
        codes[start : start + count] = np.packbits(features @ directions > 0, axis=1)
    return codes


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits FAISS's searches in this thread to one core."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def compare(size: int, bits: int, rounds: int, k: int = 20) -> list[list[object]]:
    """Returns the rows of the table of exact searches."""
    import faiss

    codes, queries = clustered(size, bits), clustered(QUERIES, bits, 2)
    bare = faiss.IndexBinaryFlat(bits)
    built = measuring.in_turns(
        {"bare": lambda: (bare.reset(), bare.add(codes)), "index": lambda: cib.Index.of(codes)}, rounds=rounds
    )
    index = cib.Index.of(codes)

    def one_by_one(search: Callable[..., object], count: int) -> None:
        for row in range(count):
            search(queries[row : row + 1], k)

    def on_one_core() -> None:
        with one_thread():
            one_by_one(bare.search, 50)

    alone = measuring.in_turns(
        {
            "bare": lambda: one_by_one(bare.search, 50),
            "one core": on_one_core,
            "index": lambda: one_by_one(index.search, 50),
        },
        rounds=rounds,
    )
    batch = measuring.in_turns(
        {"bare": lambda: bare.search(queries, k), "index": lambda: index.search(queries, k)}, rounds=rounds
    )
    faiss_distances, faiss_ids = bare.search(queries, k)
    distances, ids = index.search(queries, k)
    assert np.array_equal(faiss_distances, distances)
    print(f"FAISS returns the same id at {np.mean(faiss_ids == ids):.1%} of the ranks, but for reordered ties\n")
    row = functools.partial(_row, size)
    return [
        row("build, s", built["bare"], built["index"], 1),
        row("one by one, ms/query", alone["bare"], alone["index"], 1000 / 50),
        row("the same, FAISS limited to one core", alone["one core"], alone["index"], 1000 / 50),
        row(f"batches of {QUERIES}, ms/query", batch["bare"], batch["index"], 1000 / QUERIES),
    ]


def _row(size: int, name: str, bare: measuring.Seconds, index: measuring.Seconds, scale: float) -> list[object]:
    figures = [f"{side.median * scale:.4g} (min {min(side.rounds) * scale:.4g})" for side in (bare, index)]
    return [f"{size:,}", name, *figures, measuring.format_ratio(bare, index)]


def grow(bits: int, rounds: int) -> tuple[list[list[object]], float]:
    """Returns the rows of exact searches by number of codes, and the exponent with which the time grows."""
    codes, queries = clustered(16_000_000, bits), clustered(20, bits, 2)
    sizes = [1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000]
    indices = {size: cib.Index.of(codes[:size]) for size in sizes}
    sides = {str(size): functools.partial(index.search, queries, 20) for size, index in indices.items()}
    found = measuring.in_turns(sides, rounds=rounds)
    fastest = [min(found[str(size)].rounds) / len(queries) for size in sizes]
    rows = [
        [f"{size:,}", f"{found[str(size)].median / len(queries) * 1000:.3f}", f"{seconds * 1000:.3f}"]
        for size, seconds in zip(sizes, fastest, strict=True)
    ]
    return rows, growth.exponent(sizes, fastest)


def approximate(kind_of_codes: str, size: int, bits: int, rounds: int, k: int = 10) -> list[list[object]]:
    """Returns the rows of recall and time of approximate kinds against the exact kind, queries in one batch."""
    make = {"clustered": clustered, "uniform": uniform}[kind_of_codes]
    codes, queries = make(size, bits), make(QUERIES, bits, 2)
    exact = cib.Index.of(codes)
    farthest = exact.search(queries, k)[0][:, -1:]
    rows: list[list[object]] = []
    for kind, settings in SETTINGS if size > 2_000_000 else [("hnsw", {}), ("ivf", {}), ("mih", {})]:
        begun = time.perf_counter()
        index = cib.Index.of(codes, kind, **settings)
        built = time.perf_counter() - begun
        taken = measuring.in_turns(
            {"exact": lambda: exact.search(queries, k), "index": functools.partial(index.search, queries, k)},
            rounds=rounds,
        )
        distances, _ = index.search(queries, k)
        rows.append(
            [
                f"{kind_of_codes}, {size:,}",
                " ".join([kind, *(f"{name}={value}" for name, value in settings.items())]),
                f"{built:.0f}",
                f"{np.mean(distances <= farthest):.3f}",
                *(f"{taken[side].median / QUERIES * 1000:.3f}" for side in ("exact", "index")),
                measuring.format_ratio(taken["exact"], taken["index"]),
            ]
        )
    return rows


def group(size: int, bits: int) -> list[list[object]]:
    """Returns the rows of the table of near-duplicate groups."""
    rows: list[list[object]] = []
    for name, make in {"clustered": clustered, "uniform": uniform}.items():
        index = cib.Index.of(make(size, bits))
        for radius in (0, 1, 2, 3):
            begun = time.perf_counter()
            found = index.groups(radius)
            seconds = time.perf_counter() - begun
            rows.append([f"{name}, {size:,}", radius, f"{seconds:.1f}", f"{len(found):,}", f"{sum(map(len, found)):,}"])
    return rows


def rerank(bits: int, seeds: int = 3, first: int = 100) -> list[list[object]]:
    """Returns the rows of MAP@100 of digits before and after the first hits are re-ranked by the queries' logits."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    images = (digits.images[..., None] * 15.9).astype(np.uint8).repeat(3, axis=-1)
    labels, rows = digits.target, []
    for seed in range(seeds):
        trained = {"bits": bits, "image_size": 16, "augment": "digits", "temperature": 0.5, "epochs": 20, "seed": seed}
        hasher = cib.fit(images[:1500], **trained)
        index, logits = cib.Index.of(hasher.encode(images[:1500])), hasher.logits(images[1500:])
        _, ids = index.search(hasher.encode(images[1500:]), first)
        _, again = index.rerank(logits, ids)
        before, after = (ranking.mean_average_precision(labels[found] == labels[1500:, None]) for found in (ids, again))
        rows.append([bits, seed, f"{before:.4f}", f"{after:.4f}"])
    return rows


def rerank_photos(data_dir: str, bits: int, seeds: int = 3) -> list[list[object]]:
    """Returns the rows of MAP of CIFAR-10, 2,000 queries on 50,000, before and after re-ranking."""
    encoded = _cifar_features(data_dir)
    some = np.random.default_rng(0).choice(10_000, 2000, replace=False)
    queries, labels = encoded["query"][0][some], encoded["query"][1][some]
    rows: list[list[object]] = []
    for seed in range(seeds):
        hasher = cib.fit(encoded["train"][0], bits=bits, backbone="none", augment="noise", seed=seed, epochs=40)
        index = cib.Index.of(hasher.encode(encoded["database"][0]))
        codes, logits, row = hasher.encode(queries), hasher.logits(queries), [bits, seed]
        for first in (100, 1000):
            _, ids = index.search(codes, first)
            _, again = index.rerank(logits, ids)
            relevant = (encoded["database"][1][found] == labels[:, None] for found in (ids, again))
            row += [f"{ranking.mean_average_precision(some):.4f}" for some in relevant]
        rows.append(row)
    return rows


@functools.cache
def _cifar_features(data_dir: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns unaugmented features of EfficientNet-Lite0 at 128 px, and labels, in the splits of configs/cifar.py."""

    from cib_jax.config import build
    from cib_jax.distributed import sharding
    from cib_jax.models.encoder import plain_features
    from configs import cifar

    config = cifar.get_config()
    config.data.dir = data_dir
    splits = build.draw_splits(config)
    encoder, params, frozen, _ = build.encoder(config)
    found = {}
    for name in ("train", "database", "query"):
        images = getattr(splits, name)
        batches = (
            np.stack([images.images[at] for at in range(start, min(start + 100, len(images)))])
            for start in range(0, len(images), 100)
        )
        rows = sharding.map_batches(
            lambda batch, first: plain_features(encoder, params, frozen, batch, None), batches, size=100
        )
        found[name] = (np.concatenate([np.asarray(row) for row in rows]), np.asarray(images.labels))
    return found


def table(size: int, bits: int, rounds: int) -> list[list[object]]:
    """Returns the rows of times of a table of photos on disk: loading codes, reading 20 hits, committing photos."""
    from cib_jax.storage.photo_table import IndexMetadata, PhotoTable, Row

    codes, generator = clustered(size, bits), np.random.default_rng(3)
    with tempfile.TemporaryDirectory() as folder:
        made = PhotoTable.create(folder, IndexMetadata("/photos", {"bits": bits, "side": 128}), b"no encoder")
        for start in range(0, size, 1 << 15):
            some = codes[start : start + (1 << 15)]
            thumbnails = generator.bytes(2000 * len(some))
            made.put(
                [
                    Row(
                        f"album {at % 100}/IMG_{start + at:08d}.jpg",
                        size=3_000_000 + at,
                        modified_ns=10**18 + at,
                        code=code.tobytes(),
                        width=640,
                        height=480,
                        thumbnail=thumbnails[2000 * at : 2000 * (at + 1)],
                    )
                    for at, code in enumerate(some)
                ]
            )
        made.compact()

        def load() -> tuple[PhotoTable, object, cib.Index]:
            opened = PhotoTable.open(folder)
            snapshot = opened.snapshot()
            return opened, snapshot, cib.Index.of(snapshot.codes)

        opened, snapshot, index = load()
        hits = index.search(clustered(1, bits, 2), 20)[1][0].tolist()
        rows = [Row(f"new/{number}.jpg", 1, number, codes[0].tobytes(), 1, 1, b"") for number in range(512)]
        taken = measuring.in_turns(
            {
                "open the table, load all codes, index them": load,
                "path, size and dimensions of 20 hits": lambda: opened.read(
                    snapshot, hits, ["path", "width", "height"]
                ),
                "the same and their thumbnails": lambda: opened.read(snapshot, hits, ["path", "thumbnail"]),
                "sizes and modification times of all, to find changes": opened.state,
                "commit 512 photos": lambda: opened.put(rows),
            },
            rounds=rounds,
        )
    return [[f"{size:,}", name, f"{some.median:.4f}", f"{min(some.rounds):.4f}"] for name, some in taken.items()]


def peak(size: int, bits: int) -> dict[str, float]:
    """Returns this process's peak memory in MiB before the codes exist, with the codes, and after ten searches."""
    start = _peak()
    codes = np.empty((size, bits // 8), np.uint8)
    generator = np.random.default_rng(0)
    for begin in range(0, size, 1 << 20):
        rows = codes[begin : begin + (1 << 20)]
        rows[:] = generator.integers(0, 256, rows.shape, np.uint8)
    with_codes, begun = _peak(), time.perf_counter()
    index = cib.Index.of(codes)
    built, begun = time.perf_counter() - begun, time.perf_counter()
    index.search(codes[:10], 20)
    searched = time.perf_counter() - begun
    return {"start": start, "codes": with_codes, "searched": _peak(), "built s": built, "ms/query": searched * 100}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Reads the flags and prints the tables."""
    parser = measuring.parser("Searching packed codes.", "faiss")
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=10_000_000, help="number of codes with --approximate")
    parser.add_argument("--growth", action="store_true", help="exact search of 1 to 16 million codes")
    parser.add_argument("--approximate", action="store_true", help="recall and time of the approximate kinds")
    parser.add_argument("--groups", action="store_true", help="near-duplicates of a million codes")
    parser.add_argument("--rerank", action="store_true", help="gain of ranking by logits on digits")
    parser.add_argument("--data_dir", help="a TFDS data_dir: --rerank uses CIFAR-10 instead")
    parser.add_argument("--table", action="store_true", help="a million photos in a table on disk")
    parser.add_argument("--memory", type=int, metavar="SIZE", help="peak memory of an index of this size")
    parser.add_argument("--peak", type=int, metavar="SIZE", help="the same in this process, as JSON (used internally)")
    flags = parser.parse_args()
    if flags.peak:
        print(json.dumps(peak(flags.peak, flags.bits)))
        return
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{measuring.machine('faiss-cpu', 'numpy')}; {flags.bits} bits; load before: {load}\n")
    if flags.memory:
        # Measured in a child before anything else, since it starts with the peak memory of its parent.
        command = [sys.executable, "-m", "benchmarks.search", "--peak", str(flags.memory), "--bits", str(flags.bits)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        point = json.loads(done.stdout.splitlines()[-1])
        header = ["codes", "MiB before", "MiB with the codes", "peak MiB", "build, s", "ms/query, batch of 10"]
        figures = (f"{value:,.0f}" if value >= 1 else f"{value:.2g}" for value in point.values())
        measuring.print_table(header, [[f"{flags.memory:,}", *figures]])
        return
    if flags.growth:
        rows, power = grow(flags.bits, flags.rounds)
        measuring.print_table(["codes", "ms/query, batch of 20", "min"], rows)
        print(f"time grows with the number of codes to the power {power:.2f}")
    elif flags.approximate:
        header = ["codes", "kind", "build, s", "recall@10", "exact, ms/query", "kind, ms/query", "times faster"]
        for name in ("clustered", "uniform"):
            measuring.print_table(header, approximate(name, flags.size, flags.bits, flags.rounds))
    elif flags.table:
        measuring.print_table(["photos", "work", "s", "min"], table(1_000_000, flags.bits, flags.rounds))
    elif flags.rerank and flags.data_dir:
        header = ["bits", "seed", "MAP@100", "by logits", "MAP@1000", "by logits"]
        for bits in (16, 32, 64):
            measuring.print_table(header, rerank_photos(flags.data_dir, bits))
    elif flags.rerank:
        for bits in (16, flags.bits):
            measuring.print_table(["bits", "seed", "MAP@100 by Hamming distance", "by logits"], rerank(bits))
    elif flags.groups:
        measuring.print_table(["codes", "radius", "s", "groups", "codes in them"], group(1_000_000, flags.bits))
    else:
        header = ["codes", "work", "FAISS's IndexBinaryFlat", "Index", "times faster"]
        measuring.print_table(header, compare(1_000_000, flags.bits, flags.rounds))


if __name__ == "__main__":
    main()
