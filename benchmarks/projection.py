"""Estimates for large machines and a billion images, from compiled programs and published figures.

`python -m benchmarks.projection FILE` takes the figures of four programs that were compiled for TPUs by
`python -m benchmarks.tpu_compile`: efficientnet-stream and paper-stream with `--chips v5e-256 --batch 65536 --json
FILE`, encode-efficientnet and encode-vgg16, which chips run by themselves, with `--chips v5e-8 --json FILE`. Nothing
was run on such a machine. Of GPUs, FLOPs and bytes are those of the programs for TPUs. The decoding rate is the one
measured in docs/performance.md. Not counted: that storage, decoding and communication may not overlap with computation.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks import measuring
from benchmarks.tpu_compile import BITS, CHIPS, Chip, Figures

IMAGES = 10**9
BATCH = 1 << 16
"""Images per step, over all devices."""

COMPILED = 256
"""Chips for which the programs were compiled."""

SHARES = (1.0, 0.5)
"""Shares of the roofline: the upper bound, and an assumption that only a run on the machine can replace."""

JPEG_BYTES = 100_000
"""Bytes of a stored photo of 640 × 480: an assumption."""

NETWORKS = {
    "EfficientNet-Lite0 at 128 px": ("efficientnet-stream", "encode-efficientnet", 622),
    "VGG-16 at 224 px": ("paper-stream", "encode-vgg16", 535),
}
"""For each network its programs, and the measured JPEGs of 640 × 480 per second and core (docs/performance.md)."""


class Machine(NamedTuple):
    """Published figures of a machine."""

    name: str
    devices: int
    chip: Chip
    across: float
    """Bytes per second that a device sends to other hosts, one way; the chip's links on a single torus."""
    price: float | None
    """Dollars per hour and device; None without a source."""


MACHINES = (
    # The price of TPUs is listed at https://cloud.google.com/tpu/pricing, which was not available for this.
    Machine("TPU v5e-256", 256, CHIPS["v5e"], CHIPS["v5e"].links, None),
    # 3,200 Gbit/s for 8 GPUs, 4.916 dollars: https://aws.amazon.com/ec2/capacityblocks/pricing, late in 2024.
    Machine("64 × H100 SXM", 64, CHIPS["h100"], 50e9, 4.916),
)


def epoch(machine: Machine, training: Figures, encoding: Figures, decoded: int) -> list[list[str]]:
    """Returns the rows for an epoch of training the head on fresh views, and for encoding all images once."""
    scale = COMPILED / machine.devices  # of the work of a device, for the same images on another number of them
    sent = sum(training.sent.values())
    step = {"matrix": training.flops * scale / machine.chip.flops}
    step |= {"memory": training.bytes * scale / machine.chip.bandwidth, "links": sent / machine.across}
    bound = max(step, key=step.__getitem__)
    steps, coded = IMAGES / training.images, IMAGES / encoding.rate(machine.chip) / machine.devices
    rows = [
        ["FLOPs per image, training", f"{training.flops * COMPILED / training.images / 1e9:,.2f} G", "two views"],
        [
            "bytes per image, training",
            f"{training.bytes * COMPILED / training.images / 1e6:,.1f} MB",
            "read and written",
        ],
        ["memory of a device", f"{training.memory / 1e9:.1f} of {machine.chip.memory / 1e9:.0f} GB", ""]
        if scale == 1
        else ["memory of a device", "not compiled", ""],
        *([f"a step, {name} alone", f"{seconds * 1e3:,.1f} ms", ""] for name, seconds in step.items()),
    ]
    for share in SHARES:
        hours, encoded = steps * step[bound] / share / 3600, coded / share / 3600
        cores = IMAGES / (hours * 3600) / decoded
        at = f"at {share:.0%} of the roofline"
        cost = f"; {hours * machine.devices * machine.price:,.0f} dollars" if machine.price else ""
        rows += [
            [f"an epoch, {at}", f"{hours * 60:,.1f} min", f"{hours * machine.devices:,.1f} device hours{cost}"],
            [f"encoding, {at}", f"{encoded * 60:,.1f} min", f"{encoded * machine.devices:,.1f} device hours"],
            [f"cores for decoding, {at}", f"{cores:,.0f}", f"{cores / machine.devices:,.0f} per device"],
            [f"read from storage, {at}", f"{IMAGES * JPEG_BYTES / hours / 3600 / 1e9:,.0f} GB/s", "during an epoch"],
        ]
    return rows


def memory() -> list[list[str]]:
    """Returns the rows for memory and storage."""
    from cib_jax import losses

    rows = []
    for machine in MACHINES:
        count = 2 * BATCH // machine.devices * 2 * BATCH  # two views of each image
        blocks = math.ceil(count / losses.MAX_SIMILARITIES)
        rows.append(
            [
                f"NT-Xent similarities per device, {machine.name}",
                f"{4 * count / 1e9:.2f} GB",
                f"{4 * min(count, losses.MAX_SIMILARITIES) / 1e6:.0f} MB at once, blocks: {blocks}",
            ]
        )
    return [
        *rows,
        ["order of an epoch, int64", f"{8 * IMAGES / 1e9:.0f} GB", "in every process (dataset.epoch_order)"],
        ["codes", f"{BITS // 8 * IMAGES / 1e9:.0f} GB", f"{BITS} bits per image"],
        ["names of 60 characters, as Python strings", f"{IMAGES * (49 + 60 + 8) / 1e9:.0f} GB", "in every process"],
        ["JPEGs in storage", f"{IMAGES * JPEG_BYTES / 1e12:.0f} TB", f"{JPEG_BYTES:,} bytes each: an assumption"],
        ["photos prepared at 160 px", f"{IMAGES * 160 * 160 * 3 / 1e12:.0f} TB", "raw, as in the photo cache"],
        [
            "one view in a bank, float16",
            f"{IMAGES * 1280 * 2 / 1e12:.2f} TB",
            "1,280 features; replicated on every device",
        ],
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("file", type=pathlib.Path, help="figures that `benchmarks.tpu_compile --json` wrote")
    found: Mapping[str, dict] = json.loads(parser.parse_args(arguments).file.read_text())
    print(f"Estimates for {IMAGES:,} images, {BITS} bits, {BATCH:,} images per step\n")
    for machine in MACHINES:
        for network, (training, encoding, decoded) in NETWORKS.items():
            names = f"{training} v5e-{COMPILED} {BATCH}", f"{encoding} v5e-8 800"
            figures = [Figures(**found[name]) for name in names]
            print(f"{machine.name}, {network}\n")
            measuring.print_table(["estimate", "value", ""], epoch(machine, *figures, decoded))
    measuring.print_table(["stored", "size", ""], memory())


if __name__ == "__main__":
    main()
