"""Scaling of a training step with devices: time on simulated devices, and bytes sent, from the compiled program.

`python -m benchmarks.scaling` measures every point in a new process, since the number of devices is fixed when JAX
starts. Simulated devices share this machine's cores, so that times show the overhead of parallelism, not its gain; the
bytes hold for any machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks import collectives, measuring

STEPS = 8
"""Training steps of the head in one compiled program."""

SIDE = 32
"""Side of the ConvNet's images, in pixels."""

FEATURES = 1280


class Point(NamedTuple):
    """Settings of one measurement."""

    work: str
    """`features` (the hash head on a view bank) or `images` (the whole ConvNet)."""
    devices: int
    batch: int
    bits: int
    timed: bool = True


def program(point: Point) -> tuple[Any, Any, int]:
    """Returns the steps of a feed, the initial state and the number of trained parameters."""
    import jax
    import jax.numpy as jnp
    import optax

    import cib_jax as cib
    from cib_jax.distributed import sharding
    from cib_jax.training import input_pipeline
    from cib_jax.training.train_step import Method

    of_features = point.work == "features"
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0),
        backbone="efficientnet_lite0" if of_features else "convnet",
        bits=point.bits,
        frozen=of_features,
        pretrained=False,
        image_size=128 if of_features else SIDE,
    )
    optimizer = optax.adam(1e-3)
    mesh = sharding.make_mesh(point.devices, point.batch)
    order = input_pipeline.BatchOrder(0, point.batch, mesh=mesh)
    method = Method(encoder, optimizer)
    if of_features:
        bank = jax.random.normal(jax.random.key(1), (2, STEPS * point.batch, FEATURES), jnp.float16)
        fed = input_pipeline.from_bank(bank, method, order)
    else:
        images = jax.random.randint(jax.random.key(1), (point.batch, SIDE, SIDE, 3), 0, 256).astype(jnp.uint8)
        fed = input_pipeline.from_device(images, frozen, method, order)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return fed.steps, cib.create_train_state(params, optimizer), parameters


def measure(point: Point) -> dict[str, Any]:
    """Returns the seconds of a step, and [kind, bytes, devices, times, source, sent] of each collective."""
    import jax

    steps, state, parameters = program(point)
    many = STEPS if point.work == "features" else 1
    order = np.random.default_rng(0).permutation(many * point.batch).reshape(many, point.batch)
    arguments = (order, np.int32(0), jax.random.key(2))
    text = jax.jit(steps).lower(state, *arguments).compile().as_text()
    found = [[*one, one.sent] for one in collectives.read(text)]
    result = {"parameters": parameters, "steps": many, "collectives": found, "seconds": float("nan")}
    if point.timed:
        state, _ = jax.block_until_ready(steps(state, *arguments))
        taken: list[float] = []
        while len(taken) < 3 or (sum(taken) < 3 and len(taken) < 100):
            begun = time.perf_counter()
            state, _ = jax.block_until_ready(steps(state, *arguments))
            taken.append((time.perf_counter() - begun) / many)
        result["seconds"] = float(np.median(taken))
    return result


def measure_in_process(point: Point) -> dict[str, Any]:
    """Returns `measure` of a point, run in a new process with the point's number of devices."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--one", json.dumps(point)]
    flag = f"--xla_force_host_platform_device_count={point.devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def closed_form(point: Point, parameters: int) -> dict[str, int]:
    """Returns the bytes of a step's collectives on each device that the method needs.

    Every device gathers the codes of both views of the whole batch (all-gather), receives the gradients of its own
    codes (reduce-scatter), and sums the gradients of all parameters with loss, contrast and KL (all-reduce).
    """
    if point.devices == 1:
        return {}
    codes = 2 * point.batch * point.bits * 4
    return {
        "all-gather": codes,
        "reduce-scatter": codes // point.devices,
        "all-reduce": 4 * (parameters + 3),
    }


def by_kind(result: dict[str, Any], field: int) -> dict[str, float]:
    """Returns the sums over a step's collectives of their bytes (field 1) or bytes sent (field −1)."""
    sums: dict[str, float] = {}
    for one in result["collectives"]:
        sums[one[0]] = sums.get(one[0], 0) + one[field] * one[3] / result["steps"]
    return sums


def growth(title: str, points: list[Point]) -> None:
    """Prints the time of a step for each number of devices, and its ratio to the first."""
    rows, first = [], 0.0
    for point in points:
        seconds = measure_in_process(point)["seconds"]
        first = first or seconds
        cells = (f"{seconds * 1e3:.1f}", f"{seconds / first:.2f}", f"{point.batch / seconds:,.0f}")
        rows.append([point.devices, f"{point.batch:,}", *cells])
    print(f"{title}\n")
    measuring.print_table(["devices", "batch", "ms/step", "ratio to one device", "images/s"], rows)


def communication(points: list[Point]) -> None:
    """Prints the bytes of a step's collectives on each device, counted and expected."""
    rows = []
    for point in points:
        result = measure_in_process(point)
        counted, expected = by_kind(result, 1), closed_form(point, result["parameters"])
        calls = sum(one[3] for one in result["collectives"]) / result["steps"]
        rows.append(
            [
                point.work,
                point.devices,
                f"{point.batch:,}",
                point.bits,
                *(f"{counted.get(kind, 0):,.0f}" for kind in ("all-gather", "reduce-scatter", "all-reduce")),
                "yes" if counted == expected else f"no: {expected}",
                f"{calls:.0f}",
                f"{sum(by_kind(result, -1).values()):,.0f}",
            ]
        )
    print("Bytes of a step on each device, from the compiled program\n")
    header = ["work", "devices", "batch", "bits", "all-gather", "reduce-scatter", "all-reduce", "closed form"]
    measuring.print_table([*header, "collectives", "sent with rings"], rows)


def main() -> None:
    """Reads the flags and prints the tables."""
    parser = argparse.ArgumentParser(description="Scaling with devices.", formatter_class=measuring.Formatter)
    parser.add_argument("--only", choices=["times", "bytes"], help="measure one of the two")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="simulated devices")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(measure(Point(*json.loads(flags.one)))))
        return
    print(f"{measuring.machine('jax')}\n")
    many = flags.devices
    if flags.only != "bytes":
        for work, whole, each in (("features", 512, 64), ("images", 64, 8)):
            growth(f"{work}, one batch split over devices", [Point(work, n, whole, 64) for n in many])
            growth(f"{work}, a fixed batch per device", [Point(work, n, each * n, 64) for n in many])
    if flags.only != "times":
        points = [Point("features", n, 512, 64, False) for n in many]
        points += [Point("features", many[-1], batch, 64, False) for batch in (64, 4096)]
        points += [Point("features", many[-1], 512, bits, False) for bits in (16, 256)]
        communication([*points, *(Point("images", n, 64, 64, False) for n in many)])


if __name__ == "__main__":
    main()
