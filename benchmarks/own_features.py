"""Hashing of given features: this project's objective with noise as views against ITQ and LSH on the same features.

`python -m benchmarks.own_features` uses the pixels of scikit-learn's digits; `--data-dir=DIR`, a TFDS data_dir with
CIFAR-10, adds EfficientNet-Lite0's features of unaugmented images at 128 px, in the paper's splits.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import sklearn.datasets

import cib_jax as cib
from benchmarks import measuring
from cib_jax.baselines import BASELINES
from cib_jax.data import dataset, sources, splits
from cib_jax.data.dataset import DataConfig
from cib_jax.data.splits import PROTOCOLS
from cib_jax.models.encoder import plain_features


class Task(NamedTuple):
    """Features for training, queries and database, with labels of queries and database."""

    name: str
    train: np.ndarray
    query: np.ndarray
    database: np.ndarray
    query_labels: np.ndarray
    database_labels: np.ndarray


def make_digits() -> Task:
    """Returns the 64 pixels of digits: 297 queries on a database of 1,500, all of which train."""
    digits = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    features, labels = (digits.data[order] / 16).astype(np.float32), digits.target[order]
    return Task("digits, 64 pixels", features[297:], features[:297], features[297:], labels[:297], labels[297:])


def make_cifar(directory: str) -> Task:
    """Returns features of CIFAR-10 in the paper's splits."""
    drawn = splits.draw_splits(sources.load(DataConfig("cifar10", directory)), PROTOCOLS["cifar10-10k-50k"], seed=0)
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0),
        backbone="efficientnet_lite0",
        bits=32,
        image_size=128,
        backbone_params=cib.load_pretrained("efficientnet_lite0"),
    )

    def features(part: dataset.ImageSet) -> np.ndarray:
        batches = dataset.stream(part.images, np.arange(len(part)), 100)
        return np.concatenate([np.asarray(plain_features(encoder, params, frozen, images)) for images in batches])

    made = [features(part) for part in (drawn.train, drawn.query, drawn.database)]
    assert drawn.query.labels is not None and drawn.database.labels is not None
    return Task("CIFAR-10, EfficientNet-Lite0", *made, drawn.query.labels, drawn.database.labels)


def baseline(name: str) -> Callable[[Task, int, int], tuple[np.ndarray, np.ndarray]]:
    """Returns a function that maps a task, bits and a seed to packed codes by one of `cib_jax.baselines`."""

    def codes(task: Task, bits: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        encode = BASELINES[name].fit(task.train, bits, jax.random.key(seed))
        query, database = (np.asarray(cib.pack_bits(encode(part))) for part in (task.query, task.database))
        return query, database

    return codes


def ours(task: Task, bits: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns packed codes by this project with its default settings."""
    hasher = cib.fit(task.train, backbone="none", augment="noise", bits=bits, seed=seed)
    return hasher.encode(task.query), hasher.encode(task.database)


def main() -> None:
    """Reads the flags and prints the table."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--data-dir", help="TFDS data_dir with CIFAR-10")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 32, 64], help="code lengths")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    flags = parser.parse_args()
    print(measuring.machine("jax", "numpy"), end="\n\n")
    rows = []
    for task in [make_digits(), *([make_cifar(flags.data_dir)] if flags.data_dir else [])]:
        for name, method in (("LSH", baseline("lsh")), ("ITQ", baseline("itq")), ("cib_jax, noise", ours)):
            cells, seconds = [], []
            for bits in flags.bits:
                found = []
                for seed in range(flags.seeds):
                    begun = time.perf_counter()
                    codes = method(task, bits, seed)
                    seconds.append(time.perf_counter() - begun)
                    labels = task.query_labels, task.database_labels
                    found.append(cib.mean_average_precision(*codes, *labels, k=1000))
                cells.append(measuring.mean_and_deviation(found))
            rows.append((task.name, name, *cells, f"{np.median(seconds):.1f} s"))
    print(f"MAP@1000 over {flags.seeds} seeds, and the time of one fit with encoding")
    measuring.print_table(("features", "method", *(f"{bits} bits" for bits in flags.bits), "median time"), rows)


if __name__ == "__main__":
    main()
