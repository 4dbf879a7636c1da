"""Growth of time and memory with batch, bits, database and image size, and its exponents.

`python -m benchmarks.growth` measures every point in a new process, to read its peak memory from the system.
"""

import argparse
import functools
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import measuring

SWEEPS: dict[str, tuple[str, str, list[int]]] = {
    "batch": ("training step of the head, 64 bits, by batch", "images", [64, 128, 256, 512, 1024, 2048, 4096]),
    "bits": ("training step of the head, batch 256, by bits", "bits", [16, 32, 64, 128, 256]),
    "database": ("MAP@1000 of 100 queries, 64 bits, by database", "codes", [10**4, 10**5, 10**6, 10**7]),
    "length": ("MAP@1000 of 100 queries on 1,000,000 codes, by bits", "bits", [16, 32, 64, 128, 256]),
    "pixels": ("features of 32 images, EfficientNet-Lite0, by side", "px", [64, 96, 128, 192, 224, 320]),
    "views": ("32 views of CIFAR-like images, by side", "px", [64, 96, 128, 192, 224, 320]),
}


def step(batch: int, bits: int) -> Callable[[], Any]:
    """Returns a training step on features of 1,280 numbers."""
    import jax
    import optax

    import cib_jax as cib

    encoder, params, _ = cib.create_encoder(
        jax.random.key(0), backbone="efficientnet_lite0", bits=bits, frozen=True, pretrained=False
    )
    optimizer = optax.adam(1e-3)
    state = cib.create_train_state(params, optimizer)
    first, second = jax.random.uniform(jax.random.key(1), (2, batch, 1280))
    train_step = jax.jit(functools.partial(cib.train_step_on_features, encoder=encoder, optimizer=optimizer))
    return lambda: jax.block_until_ready(train_step(state, first, second, jax.random.key(2)))


def ranking(database: int, bits: int) -> Callable[[], Any]:
    """Returns the computation of MAP@1000 for 100 random queries and ten classes."""
    import cib_jax as cib

    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (database, bits // 8), np.uint8)
    labels = generator.integers(0, 10, database)
    return lambda: cib.mean_average_precision(codes[:100], codes, labels[:100], labels, 1000)


def features(side: int) -> Callable[[], Any]:
    """Returns the forward pass of 32 images."""
    import jax

    import cib_jax as cib

    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0), backbone="efficientnet_lite0", bits=64, frozen=True, pretrained=False, image_size=side
    )
    views = jax.random.normal(jax.random.key(1), (32, side, side, 3))
    forward = jax.jit(encoder.features)
    return lambda: forward(params, frozen, views).block_until_ready()


def augmented(side: int) -> Callable[[], Any]:
    """Returns the augmentation of 32 images of 32 pixels."""
    import jax

    from cib_jax.augment import augment

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8)
    view = jax.jit(functools.partial(augment.view_each, image_size=side))
    keys = augment.image_keys(jax.random.key(0), len(images))
    return lambda: view(keys, images).block_until_ready()


WORK: dict[str, Callable[[int], Callable[[], Any]]] = {
    "batch": lambda batch: step(batch, 64),
    "bits": lambda bits: step(256, bits),
    "database": lambda database: ranking(database, 64),
    "length": lambda bits: ranking(10**6, bits),
    "pixels": features,
    "views": augmented,
}


def measure(sweep: str, size: int) -> dict[str, float]:
    """Returns the median seconds of one point, and this process's peak memory in MiB before and after the work."""
    work = WORK[sweep](size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    work()
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < 1 and len(taken) < 200):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": float(np.median(taken)), "before": before, "peak": peak}


def exponent(sizes: list[int], values: list[float]) -> float:
    """Returns the slope of log(value) over log(size), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main() -> None:
    """Reads the flags and prints a table for each sweep."""
    parser = argparse.ArgumentParser(description="Growth of time and memory.", formatter_class=measuring.Formatter)
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--one", nargs=2, metavar=("SWEEP", "SIZE"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(measure(flags.one[0], int(flags.one[1]))))
        return
    print(f"{measuring.machine('jax', 'numpy')}\n")
    for name in flags.sweeps:
        title, unit, sizes = SWEEPS[name]
        points = []
        for size in sizes:
            command = [sys.executable, "-m", "benchmarks.growth", "--one", name, str(size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            points.append(json.loads(done.stdout.splitlines()[-1]))
        seconds = [point["seconds"] for point in points]
        rows = []
        for i, (size, point) in enumerate(zip(sizes, points, strict=True)):
            local = math.log(seconds[i] / seconds[i - 1]) / math.log(size / sizes[i - 1]) if i else math.nan
            rows.append(
                [
                    f"{size:,}",
                    f"{point['seconds'] * 1e3:.2f}",
                    "" if math.isnan(local) else f"{local:.2f}",
                    f"{point['before']:.0f}",
                    f"{point['peak']:.0f}",
                ]
            )
        print(f"{title}: time grows with exponent {exponent(sizes, seconds):.2f}\n")
        measuring.print_table([unit, "ms", "exponent from the row above", "MiB before", "peak MiB"], rows)


if __name__ == "__main__":
    main()
