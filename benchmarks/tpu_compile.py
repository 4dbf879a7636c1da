"""Programs of training, encoding and ranking, compiled for TPUs on a machine without one, and their rooflines.

`python -m benchmarks.tpu_compile paper rank --chips v5e-1 v5e-8` prints for each program the seconds to compile, the
memory of a chip that it takes, its FLOPs, the bytes that it reads and writes, the bytes that a chip sends, and the
shortest time that these allow. Needs `pip install 'jax[tpu]'`. `--lower cuda` lowers for another platform instead.
Nothing is run: `benchmarks.accelerator` does that, on a machine with an accelerator.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

if __name__ == "__main__":  # before JAX starts
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

import cib_jax as cib
from benchmarks import collectives, measuring
from cib_jax.augment.features import Standard
from cib_jax.distributed import sharding
from cib_jax.models import registry
from cib_jax.models.encoder import plain_features
from cib_jax.retrieval import hamming
from cib_jax.training import input_pipeline, train_step
from cib_jax.training.train_step import Batch, Method

BITS = 64
IMAGES = 5_000
"""Training images that stay on a chip, as in the protocol of CIFAR-10."""

FEATURES = 1280
"""Numbers of a feature vector, those of EfficientNet-Lite0."""

CODES = 1_000_000
"""Codes that are searched."""


class Chip(NamedTuple):
    """Published figures of a chip."""

    flops: float
    """Peak FLOP/s in bfloat16, without sparsity."""
    memory: float
    """Bytes of memory."""
    bandwidth: float
    """Bytes per second from and to the memory."""
    links: float
    """Bytes per second that it sends to other chips, one way: half of the published sum of both ways."""
    clock: float = math.nan
    """Cycles per second; of TPUs, the peak over the products of their matrix units in a cycle."""


CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 197e12 / (4 * 2 * 128**2)),  # https://docs.cloud.google.com/tpu/docs/v5e
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 918e12 / (2 * 2 * 256**2)),  # https://docs.cloud.google.com/tpu/docs/v6e
    "h100": Chip(989.4e12, 80e9, 3350e9, 450e9),  # SXM: https://glennklockwood.com/garden/processors/h100
    "h200": Chip(
        989.4e12, 141e9, 4800e9, 450e9
    ),  # the same with more memory: https://www.nvidia.com/en-us/data-center/h200
}
SLICES = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"}
"""Chips of a slice, and its shape; one chip is taken from the smallest."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Devices that share a program."""

    devices: tuple[Any, ...]

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The mesh of the devices, None for one."""
        return Mesh(self.devices, (sharding.AXIS,)) if len(self.devices) > 1 else None

    def shaped(self, tree: Any, spec: Any = sharding.WHOLE) -> Any:
        """Returns the shapes of a tree's arrays, on these devices."""
        where = NamedSharding(self.mesh, spec) if self.mesh else SingleDeviceSharding(self.devices[0])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)

    def array(self, *shape: int, dtype: Any = jnp.float32, spec: Any = sharding.WHOLE) -> jax.ShapeDtypeStruct:
        """Returns the shape of an array on these devices."""
        return self.shaped(jax.ShapeDtypeStruct(shape, dtype), spec)

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        """The shape of a random key."""
        return self.shaped(jax.eval_shape(lambda: jax.random.key(0)))


H100 = """
platform_name: "CUDA" device_description_str: "H100" dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_core: 233472
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
"""
"""What XLA is to know of a GPU that is not there, in the form of its GpuTargetConfigProto."""


def slice_of(chip: str, count: int) -> Place:
    """Returns chips for which libtpu or JAX's plug-in for CUDA compiles, wherever they are."""
    from jax.experimental import topologies

    if chip == "h100":
        jax.devices()  # loads the plug-ins
        shape = f"1x1x{count}"
        found = topologies.get_topology_desc(shape, "cuda", topology=shape, target_config=H100).devices
    else:
        found = topologies.get_topology_desc(f"{chip}:{SLICES[count]}", "tpu").devices
    return Place(tuple(found[:count]))


class Program(NamedTuple):
    """A jitted function, the shapes of its arguments, and the number of images, or queries, of one call."""

    function: Any
    arguments: tuple[Any, ...]
    images: int


def network(place: Place, backbone: str, px: int, dtype: str, fine_tune: cib.FineTune | None = None) -> Any:
    """Returns an encoder, and the shapes of its parameters to train (without `fine_tune`, the head's) and frozen ones.

    Nothing is drawn or loaded, so that they take no memory.
    """
    encoders = []

    def create(**how: Any) -> Any:
        fields = {"backbone": backbone, "bits": BITS, "image_size": px, "backbone_dtype": dtype}
        encoder, *params = cib.create_encoder(jax.random.key(0), **fields, **how)
        encoders.append(encoder)
        return params

    if backbone == "none":
        made = jax.eval_shape(lambda: create(standard=Standard(np.zeros(FEATURES), np.ones(FEATURES))))
    else:
        made = jax.eval_shape(lambda: create(pretrained=False, frozen=registry.get(backbone).convert is not None))
    if fine_tune is not None:
        how = {"frozen": False, "fine_tune": fine_tune}
        made = jax.eval_shape(lambda weights: create(backbone_params=weights, **how), made[1]["backbone"])
    return encoders[-1], *(place.shaped(part) for part in made)


def training(
    place: Place,
    batch: int,
    *,
    backbone: str,
    px: int = 0,
    side: int = 32,
    feed: str = "device",
    steps: int = 1,
    dtype: str = "bfloat16",
    fine_tune: cib.FineTune | None = None,
    **fields: Any,
) -> Program:
    """Returns training steps as a run takes them: on images of `side` pixels, on features, or on a view bank.

    XLA counts a loop's body once: a program of several `steps`, which features allow, is for running it.
    """
    encoder, params, frozen = network(place, backbone, px, dtype, fine_tune)
    method = Method(encoder, train_step.adam(1e-3), **fields)
    state = place.shaped(jax.eval_shape(lambda params: train_step.initial_state(params, method.optimizer), params))
    shape = (4, FEATURES) if backbone == "none" else (side, side, 3)
    kind = {"shape": shape} if feed == "device" else {}
    function = getattr(input_pipeline, f"{feed}_steps")(method, place.mesh, **kind)
    chunk: Any = place.array(steps, batch, dtype=jnp.int32, spec=sharding.ROWS_OF_STEPS)
    held: Any = frozen
    if feed == "bank":
        held = place.array(10, IMAGES, encoder.backbone.features, dtype=jnp.float16), None
    elif feed == "stream":
        chunk = Batch(place.array(1, batch, side, side, 3, dtype=jnp.uint8, spec=sharding.ROWS_OF_STEPS))
    else:
        held = (
            frozen,
            place.array(IMAGES, math.prod(shape), dtype=jnp.float32 if backbone == "none" else jnp.uint8),
            None,
        )
    numbers = {name: place.array(dtype=jnp.float32) for name in input_pipeline.NUMBERS}
    return Program(function, (state, (held, numbers), chunk, place.array(dtype=jnp.int32), place.key), steps * batch)


def views(place: Place, batch: int, *, px: int, side: int = 32) -> Program:
    """Returns the two views of a batch alone, as a training step draws them."""
    encoder, _, _ = network(place, "vgg16", px, "float32")
    axis = sharding.axis_of(place.mesh)

    def both(key: Any, images: Any) -> Any:
        return jnp.concatenate(encoder.two_views(key, images, axis=axis))

    images = place.array(batch, side, side, 3, dtype=jnp.uint8, spec=sharding.ROWS)
    return Program(jax.jit(sharding.shard_rows(both, place.mesh)), (place.key, images), batch)


def encoding(place: Place, batch: int, *, backbone: str, px: int, dtype: str = "bfloat16") -> Program:
    """Returns the features of images of their network's size, 100 for each device."""
    encoder, _, frozen = network(place, backbone, px, dtype)
    batch = 100 * len(place.devices)
    images = place.array(batch, px, px, 3, dtype=jnp.uint8, spec=sharding.ROWS)
    # The first and last arguments are static: functions of them are what a mesh can be closed over in.
    compute = jax.jit(lambda frozen, images: plain_features(encoder, {}, frozen, images, place.mesh))
    return Program(compute, (frozen, images), batch)


def ranking(place: Place, batch: int, *, metrics: bool = False) -> Program:
    """Returns the ranking of a block of queries, or the counts of which metrics are made; each device has its own."""
    one, words = Place(place.devices[:1]), -(-BITS // 32)
    padded = hamming.padded_size(CODES)

    def block(queries: Any, database: Any, relevance: Any) -> Any:
        distances = hamming.hamming(queries, database, CODES)
        if metrics:
            return hamming.histograms_jax(distances, relevance, BITS + 1)
        return hamming.nearest_jax(distances, 1000)

    codes = (one.array(words, count, dtype=jnp.uint32) for count in (hamming.MAX_QUERIES, padded))
    relevance = one.array(hamming.MAX_QUERIES, padded, dtype=jnp.bool_)
    return Program(jax.jit(block), (*codes, relevance), hamming.MAX_QUERIES * len(place.devices))


def contrast(place: Place, batch: int) -> Program:
    """Returns the contrast of a batch with its gradient, in blocks of rows if there are more than 4,096 codes."""
    axis = sharding.axis_of(place.mesh)

    def gradient(temperature: Any, codes: Any) -> Any:
        def loss(codes: Any) -> Any:
            return cib.nt_xent(codes[:, 0], codes[:, 1], temperature=temperature, axis=axis)

        return jax.grad(loss)(codes)

    codes = place.array(batch, 2, BITS, spec=sharding.ROWS)
    return Program(jax.jit(sharding.shard_rows(gradient, place.mesh)), (place.array(), codes), batch)


PAPER = functools.partial(training, backbone="vgg16", px=224, head_dropout=0.5)
LAST_BLOCKS, LORA = cib.FineTune(blocks=3, learning_rate=1e-4), cib.FineTune(lora_rank=8, learning_rate=1e-4)
PROGRAMS: dict[str, Callable[..., Program]] = {
    "paper": PAPER,  # configs/cifar_vgg16.py
    "paper-float32": functools.partial(PAPER, dtype="float32"),
    "paper-stream": functools.partial(PAPER, feed="stream", side=256),
    "paper-views": functools.partial(views, px=224),
    "efficientnet": functools.partial(training, backbone="efficientnet_lite0", px=128),
    "efficientnet-stream": functools.partial(training, backbone="efficientnet_lite0", px=128, feed="stream", side=160),
    "efficientnet-blocks": functools.partial(training, backbone="efficientnet_lite0", px=128, fine_tune=LAST_BLOCKS),
    "convnet": functools.partial(training, backbone="convnet", dtype="float32"),
    "vit": functools.partial(training, backbone="clip_vit_b16"),
    "vit-blocks": functools.partial(training, backbone="clip_vit_b16", fine_tune=LAST_BLOCKS),
    "vit-lora": functools.partial(training, backbone="clip_vit_b16", fine_tune=LORA),
    "bank": functools.partial(training, backbone="efficientnet_lite0", px=128, feed="bank"),
    "stored-views": functools.partial(training, backbone="none", augment="stored"),
    "encode-vgg16": functools.partial(encoding, backbone="vgg16", px=224),
    "encode-efficientnet": functools.partial(encoding, backbone="efficientnet_lite0", px=128),
    "encode-vit": functools.partial(encoding, backbone="clip_vit_b16", px=224),
    "rank": ranking,
    "metrics": functools.partial(ranking, metrics=True),
    "contrast": contrast,
}
"""Functions from devices, and the images of a step, to a program."""


def batch_of(chips: int) -> int:
    """Returns the images of a step: the paper's 64 on up to 8 chips, more where there would be few for each."""
    return max(64, 64 * (chips // 8))


# Figures of a compiled program.


class Figures(NamedTuple):
    """What the compiler says of a program, for each chip and call."""

    images: int
    """Images of a call, on all chips."""
    chips: int
    seconds: float
    """Seconds to compile."""
    memory: int
    """Bytes that arguments, results and temporary arrays take at most."""
    flops: float
    bytes: float
    """Bytes read from memory and written."""
    sent: dict[str, int]
    """Bytes sent to other chips, by kind of collective, with ring algorithms."""
    cycles: int = 0
    """Sum of the cycles that a TPU's compiler estimates for each operation; it knows none for sorts and collectives."""

    def times(self, chip: Chip) -> dict[str, float]:
        """Returns the seconds that matrix units, memory and links need at least, each by itself."""
        return {
            "matrix": self.flops / chip.flops,
            "memory": self.bytes / chip.bandwidth,
            "links": sum(self.sent.values()) / chip.links,
        }

    def rate(self, chip: Chip) -> float:
        """Returns the images a second and chip if the slowest of the three never waits for the others."""
        return self.images / self.chips / max(self.times(chip).values())


def compiled(program: Program, chips: int, platform: str = "tpu") -> tuple[Any, Figures]:
    """Returns a compiled program and its figures."""
    begun = time.perf_counter()
    made = program.function.trace(*program.arguments).lower(lowering_platforms=(platform,)).compile()
    seconds = time.perf_counter() - begun
    cost = made.cost_analysis() or {"flops": math.nan, "bytes accessed": math.nan}  # none for a GPU that is not there
    memory, text, sent = made.memory_analysis(), made.as_text(), {}
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    for one in collectives.read(text):
        sent[one.kind] = sent.get(one.kind, 0) + one.sent * one.times
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = held + memory.temp_size_in_bytes
    return made, Figures(program.images, chips, seconds, total, cost["flops"], cost["bytes accessed"], sent, cycles)


def row(name: str, where: str, figures: Figures) -> list[str]:
    """Returns the cells of a program's figures in the table."""
    chip = CHIPS[where.partition("-")[0]]
    times = figures.times(chip)
    bound = max(times, key=times.__getitem__)
    sent = ", ".join(f"{kind} {size / 1e6:,.1f}" for kind, size in figures.sent.items()) or "0"
    return [
        name,
        where,
        f"{figures.images:,}",
        f"{figures.seconds:.0f} s",
        f"{figures.memory / 1e9:.2f} of {chip.memory / 1e9:.0f} GB",
        f"{figures.flops / 1e9:,.1f} G",
        f"{figures.bytes / 1e9:,.3f} GB",
        sent,
        f"{times[bound] * 1e3:,.2f} ms ({bound})",
        f"{times['matrix'] / times[bound]:.0%}",
        f"{figures.rate(chip):,.0f}",
        f"{figures.cycles / chip.clock * 1e3:,.2f} ms",
    ]


HEADER = ["program", "chips", "images", "compiled in", "memory", "FLOPs", "bytes", "MB sent"]
HEADER += ["shortest time", "matrix units busy", "images/s a chip", "compiler's estimate"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles the programs that the flags name and prints their figures."""
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("programs", nargs="*", default=list(PROGRAMS), help=", ".join(PROGRAMS))
    parser.add_argument("--chips", nargs="+", default=["v5e-8"], help="kind and number, such as v5e-1 v5e-256 v6e-8")
    parser.add_argument("--batch", type=int, default=0, help="images of a step; 0: 64, or 64 for each 8 chips")
    parser.add_argument("--json", type=pathlib.Path, help="file to which the figures are added")
    parser.add_argument("--text", type=pathlib.Path, help="folder for the compiled programs as text")
    parser.add_argument("--lower", default="", help="lower for this platform, such as cuda, and do not compile")
    flags = parser.parse_args(arguments)
    if unknown := set(flags.programs) - PROGRAMS.keys():
        parser.error(f"no such program: {', '.join(sorted(unknown))}; choose from {', '.join(PROGRAMS)}")
    if flags.lower:
        lower(flags.programs, flags.lower, flags.batch or batch_of(1))
        return
    rows, found = [], json.loads(flags.json.read_text()) if flags.json and flags.json.exists() else {}
    for where in flags.chips:
        chip, _, count = where.partition("-")
        if chip not in ("v5e", "v6e", "h100") or not count.isdigit() or int(count) not in SLICES:
            parser.error(f"--chips must be v5e, v6e or h100, a hyphen and one of {[*SLICES]}, got {where}")
        place = slice_of(chip, int(count))
        for name in flags.programs:
            program = PROGRAMS[name](place, flags.batch or batch_of(int(count)))
            made, figures = compiled(program, int(count), "cuda" if chip == "h100" else "tpu")
            rows.append(row(name, where, figures))
            found[f"{name} {where} {figures.images}"] = figures._asdict()
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
            if flags.json:
                flags.json.write_text(json.dumps(found, indent=2))
            if flags.text:
                (flags.text / f"{name}-{where}.txt").write_text(made.as_text())
    measuring.print_table(HEADER, rows)


def lower(names: Sequence[str], platform: str, batch: int) -> None:
    """Lowers programs for one device of another platform, and prints what XLA counts before any optimization."""
    rows = []
    for name in names:
        program = PROGRAMS[name](Place(tuple(jax.devices()[:1])), batch)
        begun = time.perf_counter()
        lowered = program.function.trace(*program.arguments).lower(lowering_platforms=(platform,))
        cost = lowered.cost_analysis()
        rows.append([name, f"{time.perf_counter() - begun:.1f} s", f"{cost['flops'] / 1e9:,.1f} G"])
    measuring.print_table(["program", f"lowered for {platform} in", "FLOPs"], rows)


if __name__ == "__main__":
    main()
