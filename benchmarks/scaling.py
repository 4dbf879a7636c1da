"""How a step grows with devices: its time on simulated ones, and what it sends, counted in the compiled program.

`python -m benchmarks.scaling` measures every point in a process of its own, since the number of devices is fixed when
JAX starts. Simulated devices share this machine's cores, so that times tell what the spreading costs, not what it
gains; the bytes are those of any machine. `--project` prints estimates for large machines instead
(`benchmarks.projection`).
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
"""Of the head's training, which run as one program."""

SIDE = 32
"""Of the ConvNet's images, in pixels."""

FEATURES = 1280


class Point(NamedTuple):
    """One measurement."""

    work: str
    """features (the hash head on a view bank) or images (the ConvNet, all of it)."""
    devices: int
    batch: int
    bits: int
    timed: bool = True


def program(point: Point) -> tuple[Any, Any, int]:
    """Returns a feed's steps, the state before them and the number of parameters that are trained."""
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
    """Returns the seconds a step, and what it sends: [kind, bytes, devices, times, source, sent] of each collective."""
    import jax

    steps, state, parameters = program(point)
    many = STEPS if point.work == "features" else 1
    order = np.random.default_rng(0).permutation(many * point.batch).reshape(many, point.batch)
    arguments = (order, np.int32(0), jax.random.key(2))
    text = jax.jit(steps).lower(state, *arguments).compile().as_text()
    found = [[*one, one.sent] for one in collectives.read(text)]
    told = {"parameters": parameters, "steps": many, "collectives": found, "seconds": float("nan")}
    if point.timed:
        state, _ = jax.block_until_ready(steps(state, *arguments))
        taken: list[float] = []
        while len(taken) < 3 or (sum(taken) < 3 and len(taken) < 100):
            begun = time.perf_counter()
            state, _ = jax.block_until_ready(steps(state, *arguments))
            taken.append((time.perf_counter() - begun) / many)
        told["seconds"] = float(np.median(taken))
    return told


def elsewhere(point: Point) -> dict[str, Any]:
    """Returns `measure` of a point, taken in a process with as many devices."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--one", json.dumps(point)]
    flag = f"--xla_force_host_platform_device_count={point.devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def closed_form(point: Point, parameters: int) -> dict[str, int]:
    """Returns the bytes of a step's collectives on each device, as the method asks for them.

    Every device gathers the codes of both views of the whole batch, gives back the gradients of its own, and adds up
    the gradients of all parameters with loss, contrast and KL.
    """
    if point.devices == 1:
        return {}
    codes = 2 * point.batch * point.bits * 4
    return {
        "all-gather": codes,
        "reduce-scatter": codes // point.devices,
        "all-reduce": 4 * (parameters + 3),
    }


def by_kind(told: dict[str, Any], field: int) -> dict[str, float]:
    """Returns the sums over a step's collectives of their bytes (field 1) or bytes sent (field −1)."""
    sums: dict[str, float] = {}
    for one in told["collectives"]:
        sums[one[0]] = sums.get(one[0], 0) + one[field] * one[3] / told["steps"]
    return sums


def growth(title: str, points: list[Point]) -> None:
    """Prints times of a step, beside those on one device."""
    rows, first = [], 0.0
    for point in points:
        seconds = elsewhere(point)["seconds"]
        first = first or seconds
        told = (f"{seconds * 1e3:.1f}", f"{seconds / first:.2f}", f"{point.batch / seconds:,.0f}")
        rows.append([point.devices, f"{point.batch:,}", *told])
    print(f"{title}\n")
    measuring.print_table(["devices", "batch", "ms a step", "of one device's", "images/s"], rows)


def communication(points: list[Point]) -> None:
    """Prints the bytes of a step's collectives on each device, counted and expected."""
    rows = []
    for point in points:
        told = elsewhere(point)
        counted, expected = by_kind(told, 1), closed_form(point, told["parameters"])
        calls = sum(one[3] for one in told["collectives"]) / told["steps"]
        rows.append(
            [
                point.work,
                point.devices,
                f"{point.batch:,}",
                point.bits,
                *(f"{counted.get(kind, 0):,.0f}" for kind in ("all-gather", "reduce-scatter", "all-reduce")),
                "yes" if counted == expected else f"no: {expected}",
                f"{calls:.0f}",
                f"{sum(by_kind(told, -1).values()):,.0f}",
            ]
        )
    print("Bytes of a step on each device, counted in the compiled program\n")
    header = ["work", "devices", "batch", "bits", "all-gather", "reduce-scatter", "all-reduce", "closed form"]
    measuring.print_table([*header, "collectives", "sent, by rings"], rows)


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(description="Growth with devices.", formatter_class=measuring.Formatter)
    parser.add_argument("--project", action="store_true", help="estimates for large machines instead")
    parser.add_argument("--only", choices=["times", "bytes"], help="one of the two")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="simulated devices")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(measure(Point(*json.loads(flags.one)))))
        return
    if flags.project:
        from benchmarks import projection

        projection.main([])
        return
    print(f"{measuring.machine('jax')}\n")
    many = flags.devices
    if flags.only != "bytes":
        for work, whole, each in (("features", 512, 64), ("images", 64, 8)):
            growth(f"{work}, one batch spread over devices", [Point(work, n, whole, 64) for n in many])
            growth(f"{work}, a batch per device", [Point(work, n, each * n, 64) for n in many])
    if flags.only != "times":
        points = [Point("features", n, 512, 64, False) for n in many]
        points += [Point("features", many[-1], batch, 64, False) for batch in (64, 4096)]
        points += [Point("features", many[-1], 512, bits, False) for bits in (16, 256)]
        communication([*points, *(Point("images", n, 64, 64, False) for n in many)])


if __name__ == "__main__":
    main()
