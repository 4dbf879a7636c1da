"""Parity with the CPU and speed on the accelerators of this machine, in one command of under eight minutes.

`python -m benchmarks.accelerator --json FILE` compares losses, gradients, codes and MAP on scikit-learn's digits with
those of the CPU, then measures training, views, encoding and ranking, each against its roofline where the chip is known
(`benchmarks.tpu_compile`). Weights are random: they change no time.
"""

import functools
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import cib_jax as cib
from benchmarks import measuring, tpu_compile
from benchmarks.tpu_compile import PROGRAMS, Place, Program
from cib_jax.models.encoder import plain_features

KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "NVIDIA H200": "h200"}
"""The chip in `tpu_compile.CHIPS` of a JAX device's kind."""

MEASURED = ("paper-views", "encode-vgg16", "paper", "paper-float32", "convnet", "bank")


def parity(images: np.ndarray, labels: np.ndarray) -> list[list[str]]:
    """Returns rows of the largest differences between the first device and the CPU, at two precisions of products.

    A gradient is that of one training step, relative to its largest entry. At the default precision, TPUs round the
    operands of products to 8 bits and GPUs to 10.
    """
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    encoder, params, _ = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=32, image_size=16)
    step = functools.partial(cib.train_step, encoder=encoder, optimizer=optax.sgd(1.0), augment="digits")

    @functools.cache  # on a CPU, both columns are its own
    def on(where: Any, precision: str) -> tuple[float, np.ndarray, np.ndarray]:
        with jax.default_device(where), jax.default_matmul_precision(precision):
            state = cib.create_train_state(jax.device_put(params, where), optax.sgd(1.0))
            state, terms = jax.jit(step)(state, {}, images[:64], jax.random.key(1))
            moved = jax.tree.map(lambda old, new: np.ravel(np.asarray(old) - np.asarray(new)), params, state.params)
            features = jax.jit(plain_features, static_argnums=0)(encoder, jax.device_put(params, where), {}, images)
            packed = np.asarray(cib.pack_bits(encoder.head(params, features)))
            return float(terms["loss"]), np.concatenate(jax.tree.leaves(moved)), packed

    @functools.cache
    def views(where: Any) -> np.ndarray:
        with jax.default_device(where):
            return np.asarray(jax.jit(functools.partial(cib.two_views, image_size=32))(jax.random.key(2), images[:64]))

    rows = [["views, highest", "", "", f"{np.abs(views(device) - views(cpu)).max():.1e}"]]
    for precision in ("highest", "default"):
        (loss, gradient, codes), (cpu_loss, cpu_gradient, cpu_codes) = on(device, precision), on(cpu, precision)
        wrong = np.bitwise_count(codes ^ cpu_codes).sum() / (8 * codes.size)
        ap = cib.mean_average_precision(codes[:300], codes[300:], labels[:300], labels[300:], 100)
        cpu_ap = brute_force_map(cpu_codes[:300], cpu_codes[300:], labels[:300], labels[300:], 100)
        rows += [
            [f"loss, {precision}", f"{loss:.6f}", f"{cpu_loss:.6f}", f"{abs(loss - cpu_loss):.1e}"],
            [
                f"gradient, {precision}",
                "",
                "",
                f"{np.abs(gradient - cpu_gradient).max() / np.abs(cpu_gradient).max():.1e}",
            ],
            [f"bits that differ, {precision}", "", "", f"{wrong:.2%}"],
            [f"MAP@100, {precision}", f"{ap:.6f}", f"{cpu_ap:.6f}", f"{abs(ap - cpu_ap):.1e}"],
        ]
    return rows


def brute_force_map(queries: np.ndarray, codes: np.ndarray, asked: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns MAP@k by sorting all distances, in NumPy."""
    distances = np.bitwise_count(queries[:, None] ^ codes[None]).sum(axis=-1, dtype=np.int64)
    ranked = labels[np.argsort(distances, axis=1, kind="stable")[:, :k]] == asked[:, None]
    precision = np.cumsum(ranked, axis=1) / np.arange(1, k + 1)
    return float(np.mean((precision * ranked).sum(axis=1) / np.maximum(ranked.sum(axis=1), 1)))


def filled(program: Program) -> tuple[Any, ...]:
    """Returns arrays of the shapes that a program takes: small positive numbers, and indices that are all 0."""
    generator = np.random.default_rng(0)

    def fill(shape: jax.ShapeDtypeStruct) -> Any:
        if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), shape.sharding)
        if jnp.issubdtype(shape.dtype, jnp.floating):
            values = generator.random(shape.shape, np.float32) / 100
        else:
            values = generator.integers(0, 256 if shape.dtype == jnp.uint8 else 1, shape.shape)
        return jax.device_put(values.astype(shape.dtype), shape.sharding)

    return jax.tree.map(fill, program.arguments)


def measure(program: Program, devices: int, seconds: float) -> tuple[tpu_compile.Figures, float]:
    """Returns the figures of a program for these devices, and the median seconds of a call."""
    compiled, figures = tpu_compile.compiled(program, devices, jax.devices()[0].platform.replace("gpu", "cuda"))
    arguments, taken = filled(program), []
    while len(taken) < 4 or sum(taken) < seconds:
        begun = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        taken.append(time.perf_counter() - begun)
        if isinstance(result, tuple):  # a training step donates its state
            arguments = (result[0], *arguments[1:])
    return figures, float(np.median(taken[1:]))


def rank(queries: int, codes: int) -> float:
    """Returns the seconds in which random queries are ranked on a database of random codes, compilation excluded."""
    generator = np.random.default_rng(0)
    asked, database = (generator.integers(0, 256, (count, 8), np.uint8) for count in (queries, codes))
    cib.rank(asked[:64], database, 1000)
    begun = time.perf_counter()
    cib.rank(asked, database, 1000)
    return time.perf_counter() - begun


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures everything, prints it, and writes it to a file."""
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("programs", nargs="*", default=list(MEASURED), help=", ".join(PROGRAMS))
    parser.add_argument("--batch", type=int, default=0, help="images of a step; 0: 64, or 64 for each 8 devices")
    parser.add_argument("--seconds", type=float, default=5.0, help="least time of each measurement")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--codes", type=int, default=1_000_000)
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
    flags = parser.parse_args(arguments)
    devices = jax.devices()
    print(f"{len(devices)} × {devices[0].device_kind}; {measuring.machine('jax', 'jaxlib')}\n")

    digits = sklearn.datasets.load_digits()
    images = np.repeat(np.uint8(digits.images * (255 / 16))[..., None], 3, axis=-1)
    compared = parity(images, digits.target)
    measuring.print_table(["parity", devices[0].platform, "cpu", "difference"], compared)

    chip = tpu_compile.CHIPS.get(KINDS.get(devices[0].device_kind, ""))
    place, rows, found = Place(tuple(devices)), [], {}
    for name in flags.programs:
        steps = {"steps": 64} if name in ("bank", "stored-views") else {}  # each takes less time than its dispatch
        program = PROGRAMS[name](place, flags.batch or tpu_compile.batch_of(len(devices)), **steps)
        figures, seconds = measure(program, len(devices), flags.seconds)
        rate = figures.images / seconds
        share = rate / len(devices) / figures.rate(chip) if chip else math.nan
        found[name] = figures._asdict() | {"seconds_of_a_call": seconds, "images_per_second": rate, "roofline": share}
        cells = f"{figures.images:,}", f"{figures.seconds:.0f} s", f"{seconds * 1e3:,.2f} ms", f"{rate:,.0f}"
        rows.append([name, *cells, "unknown chip" if math.isnan(share) else f"{share:.0%}"])
    measuring.print_table(["program", "images", "compiled in", "a call", "images/s", "of the roofline"], rows)

    seconds = rank(flags.queries, flags.codes)
    print(f"{flags.queries:,} queries ranked on {flags.codes:,} codes: {seconds:.2f} s")
    if flags.json:
        content = {"device": devices[0].device_kind, "devices": len(devices), "parity": compared, "programs": found}
        content["rank"] = {"queries": flags.queries, "codes": flags.codes, "seconds": seconds}
        flags.json.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
