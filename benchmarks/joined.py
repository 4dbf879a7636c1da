"""Features of larger networks, and of several side by side: how good they are, and a file of them with their views.

`python -m benchmarks.joined --data-dir=DIR --networks efficientnet_lite0@128 efficientnet_lite2@192 --images=2000`
prints, for the first images of CIFAR-10's training set: MAP@1000 of images that rank all others by the cosine of their
centered features, the accuracy of a linear classifier that learns from the labels of one half on the other, and images
per second, for each network at its size and for all of them together. With `--views=4 --out=joined.npy` it also writes
the features of each image and of random views of it, the same views for networks of one size, as
`configs/features.py` reads them with `--config.augment=stored`.
"""

import pathlib
import time

import numpy as np
import rich.console
import sklearn.linear_model

from benchmarks import graph, measuring
from cib_jax.configs import cifar
from cib_jax.runs import context, features


def network_features(network: str, data_dir: str, images: int, views: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns features [images, 1 + views, features], labels, and images per second without views.

    The features are centered and divided by their overall standard deviation, so that all networks have the same
    weight. The speed includes compilation.
    """
    config = cifar.get_config()
    config.backbone, _, size = network.partition("@")
    config.image_size = int(size or 0)
    config.data.dir, config.data.protocol, config.cache.dir = data_dir, "own", "none"  # since speed is measured
    run = context.prepare_run(config, pathlib.Path(), rich.console.Console(stderr=True))
    some = run.splits.database.take(np.arange(images))
    assert some.labels is not None
    begun = time.perf_counter()
    plain = np.concatenate(list(features.plain(run, some, network)))
    speed = images / (time.perf_counter() - begun)
    rows = plain[:, None]
    if views:
        bank = np.asarray(features.of_views(run, some, views, f"{network}, views"), np.float32)
        rows = np.concatenate([rows, np.swapaxes(bank, 0, 1)], axis=1)
    rows = (rows - plain.mean(axis=0)) / plain.std(axis=0).mean()
    return rows.astype(np.float16), some.labels, speed


def quality(rows: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Returns MAP of cosines, and the accuracy of a linear classifier."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    half = len(rows) // 2
    classifier = sklearn.linear_model.LogisticRegression(C=20, max_iter=300).fit(unit[:half], labels[:half])
    return graph.mean_average_precision(unit, labels), float(classifier.score(unit[half:], labels[half:]))


def main() -> None:
    """Reads the flags, prints the table and writes the file."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--data-dir", required=True, help="TFDS data_dir with CIFAR-10")
    parser.add_argument(
        "--networks", nargs="+", default=["efficientnet_lite0@128"], help="names, with @ and the size of the input"
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--views", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help=".npy to write, with labels beside it")
    flags = parser.parse_args()
    parts, table, labels = [], [], np.zeros(0)
    for network in flags.networks:
        rows, labels, speed = network_features(network, flags.data_dir, flags.images, flags.views)
        parts.append(rows)
        cells = (f"{figure:.3f}" for figure in quality(rows[:, 0].astype(np.float32), labels))
        table.append((network, *cells, f"{speed:.0f}"))
    joined = np.concatenate(parts, axis=2)
    if len(parts) > 1:
        cells = (f"{figure:.3f}" for figure in quality(joined[:, 0].astype(np.float32), labels))
        table.append(("all together", *cells, ""))
    print(measuring.machine("jax"))
    measuring.print_table(("network", f"MAP@{graph.DEPTH} of cosines", "linear accuracy", "images/s"), table)
    if flags.out:
        np.save(flags.out, joined)
        np.save(flags.out.with_suffix(".labels.npy"), labels)


if __name__ == "__main__":
    main()
