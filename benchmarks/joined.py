"""Features of larger networks, and of several side by side: how good they are, a file of them, and codes of them.

`python -m benchmarks.joined --data-dir=DIR --networks efficientnet_lite0@128 efficientnet_lite2@192 --images=2000`
prints, for the first images of CIFAR-10's training set: MAP@1000 of images that rank all others by the cosine of their
centered features, the accuracy of a linear classifier that learns from the labels of one half on the other, and images
per second, for each network at its size and for all of them together. With `--views=4 --out=joined.npy` it also writes
the features of each image and of random views of it, the same views for networks of one size, as
`configs/features.py` reads them with `--config.augment=stored`. `--views=4 --fit` trains the codes of `diffusion` on
those features and prints MAP@1000 of CIFAR-10's 10,000 test images, by Hamming distance and by
asymmetric distance; with it, features are read from the cache and kept there.
"""

import pathlib
import time
from typing import NamedTuple

import numpy as np
import rich.console
import sklearn.linear_model

import cib_jax as cib
from benchmarks import asymmetric, graph, measuring
from cib_jax.codes import nested_lengths
from cib_jax.configs import cifar
from cib_jax.runs import context, features

BITS = 128


class Part(NamedTuple):
    """Features of one network, centered and divided by their overall deviation: all networks have the same weight."""

    rows: np.ndarray  # [images, 1 + views, features] of the first training images
    labels: np.ndarray
    queries: np.ndarray  # [images, features] of the test images; of none without `--fit`
    query_labels: np.ndarray
    speed: float  # images per second without views, compilation included


def compute(network: str, data_dir: str, images: int, views: int, *, fit: bool) -> Part:
    """Returns CIFAR-10's features of a network; its name has the size of its input after an @."""
    config = cifar.get_config()
    config.backbone, _, size = network.partition("@")
    config.image_size = int(size or 0)
    config.data.dir, config.data.protocol = data_dir, "own"
    config.cache.dir = "" if fit else "none"  # since speed is measured
    run = context.prepare_run(config, pathlib.Path(), rich.console.Console(stderr=True))
    some, query = run.splits.database, run.splits.query
    if images < len(some):
        some = some.take(np.arange(images))
    begun = time.perf_counter()
    plain = np.concatenate(list(features.plain(run, some, network)))
    speed = len(some) / (time.perf_counter() - begun)
    center, scale = plain.mean(axis=0), plain.std(axis=0).mean()
    rows = np.empty((len(some), 1 + views, plain.shape[1]), np.float16)
    rows[:, 0] = (plain - center) / scale
    if views:
        for view, bank in enumerate(features.of_views(run, some, views, f"{network}, views"), start=1):
            rows[:, view] = (np.asarray(bank, np.float32) - center) / scale
    queries = np.concatenate([plain[:0], *(features.plain(run, query, f"{network}, test images") if fit else ())])
    assert some.labels is not None and query.labels is not None
    return Part(rows, some.labels, (queries - center) / scale, query.labels, speed)


def quality(rows: np.ndarray, labels: np.ndarray) -> tuple[str, str]:
    """Returns MAP of cosines, and the accuracy of a linear classifier."""
    unit = rows.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    half = len(rows) // 2
    classifier = sklearn.linear_model.LogisticRegression(C=20, max_iter=300).fit(unit[:half], labels[:half])
    figures = graph.mean_average_precision(unit, labels), classifier.score(unit[half:], labels[half:])
    return f"{figures[0]:.3f}", f"{figures[1]:.3f}"


def fit(parts: list[Part], seed: int) -> None:
    """Trains nested codes of `diffusion` on the joined features, and prints both MAPs of the test images."""
    rows = join(parts)
    labels, query_labels = parts[0].labels, parts[0].query_labels
    hasher = cib.fit(
        rows,
        bits=BITS,
        nested=True,
        objective="diffusion",
        backbone="none",
        augment="stored",
        head_dropout=0.5,  # as in configs/beyond.py
        seed=seed,
    )
    codes, logits = hasher.encode(rows), hasher.logits(np.concatenate([part.queries for part in parts], axis=1))
    table = asymmetric.compare(logits, codes, query_labels, labels, graph.DEPTH, nested_lengths(BITS))
    measuring.print_table(("bits", f"MAP@{graph.DEPTH} by Hamming distance", "by asymmetric distance"), table)


def join(parts: list[Part]) -> np.ndarray:
    """Returns the rows of all networks side by side."""
    return np.concatenate([part.rows for part in parts], axis=2)


def main() -> None:
    """Reads the flags, prints the tables and writes the file."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--data-dir", required=True, help="TFDS data_dir with CIFAR-10")
    parser.add_argument(
        "--networks", nargs="+", default=["efficientnet_lite0@128"], help="names, with @ and the size of the input"
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--views", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help=".npy to write, with labels beside it")
    parser.add_argument("--fit", action="store_true", help="train codes on the features and the views")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    flags = parser.parse_args()
    if flags.fit and (flags.views < 1 or flags.images < graph.DEPTH):
        parser.error(f"--fit needs --views=1 or more and --images={graph.DEPTH} or more")
    parts = [compute(network, flags.data_dir, flags.images, flags.views, fit=flags.fit) for network in flags.networks]
    print(measuring.machine("jax"))
    if flags.out:
        np.save(flags.out, join(parts))
        np.save(flags.out.with_suffix(".labels.npy"), parts[0].labels)
    if flags.fit:
        fit(parts, flags.seed)
        return
    table = [
        (network, *quality(part.rows[:, 0], part.labels), f"{part.speed:.0f}")
        for network, part in zip(flags.networks, parts, strict=True)
    ]
    if len(parts) > 1:
        table.append(("all together", *quality(join(parts)[:, 0], parts[0].labels), ""))
    measuring.print_table(("network", f"MAP@{graph.DEPTH} of cosines", "linear accuracy", "images/s"), table)


if __name__ == "__main__":
    main()
