"""Features of larger networks, and of several side by side: how good they are before anything is trained.

`python -m benchmarks.joined --data-dir=DIR --networks efficientnet_lite0@128 efficientnet_lite2@192 --images=2000`
prints, for the first images of CIFAR-10's training set: MAP@1000 of images that rank all others by the cosine of their
centered features, the accuracy of a linear classifier that learns from the labels of one half on the other, and images
per second, for each network at its size and for all of them together.
"""

import pathlib
import time

import numpy as np
import rich.console
import sklearn.linear_model

from benchmarks import graph, measuring
from cib_jax.configs import cifar
from cib_jax.runs import context, features


def compute(network: str, data_dir: str, images: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns CIFAR-10's features of a network, centered and scaled, their labels, and images per second.

    The name of a network has the size of its input after an @. Features are divided by their overall deviation, so that
    all networks have the same weight; images per second include the compilation.
    """
    config = cifar.get_config()
    config.backbone, _, size = network.partition("@")
    config.image_size = int(size or 0)
    config.data.dir, config.data.protocol = data_dir, "own"
    config.cache.dir = "none"  # since speed is measured
    run = context.prepare_run(config, pathlib.Path(), rich.console.Console(stderr=True))
    some = run.splits.database
    some = some.take(np.arange(min(images, len(some))))
    begun = time.perf_counter()
    rows = np.concatenate(list(features.plain(run, some, network)))
    speed = len(some) / (time.perf_counter() - begun)
    assert some.labels is not None
    return (rows - rows.mean(axis=0)) / rows.std(axis=0).mean(), some.labels, speed


def quality(rows: np.ndarray, labels: np.ndarray) -> tuple[str, str]:
    """Returns MAP of cosines, and the accuracy of a linear classifier."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    half = len(rows) // 2
    classifier = sklearn.linear_model.LogisticRegression(C=20, max_iter=300).fit(unit[:half], labels[:half])
    figures = graph.mean_average_precision(unit, labels), classifier.score(unit[half:], labels[half:])
    return f"{figures[0]:.3f}", f"{figures[1]:.3f}"


def main() -> None:
    """Reads the flags and prints the table."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--data-dir", required=True, help="TFDS data_dir with CIFAR-10")
    parser.add_argument(
        "--networks", nargs="+", default=["efficientnet_lite0@128"], help="names, with @ and the size of the input"
    )
    parser.add_argument("--images", type=int, default=2000)
    flags = parser.parse_args()
    computed = [compute(network, flags.data_dir, flags.images) for network in flags.networks]
    print(measuring.machine("jax"))
    table = [
        (network, *quality(rows, labels), f"{speed:.0f}")
        for network, (rows, labels, speed) in zip(flags.networks, computed, strict=True)
    ]
    if len(computed) > 1:
        together = np.concatenate([rows for rows, _, _ in computed], axis=1)
        table.append(("all together", *quality(together, computed[0][1]), ""))
    measuring.print_table(("network", f"MAP@{graph.DEPTH} of cosines", "linear accuracy", "images/s"), table)


if __name__ == "__main__":
    main()
