"""Estimates for large machines and a billion images, computed from counts and published figures.

`python -m benchmarks.scaling --project`. Nothing was run on such a machine. FLOPs are counted by XLA in the program
lowered for a TPU; bytes between devices follow the closed form that `benchmarks.scaling` checks against compiled
programs; the decoding rate is the one measured in docs/performance.md. Not counted: augmentation, and that storage,
decoding and communication may not overlap with computation.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import measuring
from benchmarks.collectives import Collective

IMAGES = 10**9
VIEWS = 2
BITS = 64
BATCH = 1 << 16
"""Images per step, over all devices."""

UTILISATION = (1.0, 0.3)
"""Shares of the peak: the upper bound, and an assumption that only a run on the machine can replace."""

JPEG_BYTES = 100_000
"""Bytes of a stored photo of 640 × 480: an assumption."""

DECODED = {128: 622, 224: 535}
"""Measured JPEGs of 640 × 480 per second and core, by image size (docs/performance.md; for 224 px that of 256 px)."""

PASSES = 6
"""Passes in bfloat16 of a TPU for a float32 product at the highest precision, as the contrastive loss uses it."""


class Machine(NamedTuple):
    """Published figures of a machine."""

    name: str
    devices: int
    flops: float
    """Peak FLOP/s of a device in bfloat16, without sparsity."""
    memory: float
    """Memory bandwidth of a device, in bytes per second."""
    inside: float
    """Bytes per second that a device sends to its neighbors over the fast links, one way."""
    across: float
    """Bytes per second that a device sends to other hosts, one way; equal to `inside` on a single torus."""
    price: float | None
    """Dollars per hour and device; None without a source."""


MACHINES = (
    # https://docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 819 GBps, ICI 400 GBps both ways, 256 chips in one torus.
    # Its price is listed at https://cloud.google.com/tpu/pricing, which was not available when this was written.
    Machine("TPU v5e-256", 256, 197e12, 819e9, 200e9, 200e9, None),
    # 989.4 TFLOPS, 3.35 TB/s, NVLink 900 GB/s both ways: https://glennklockwood.com/garden/processors/h100.
    # 3,200 Gbit/s for 8 GPUs, 4.916 dollars: https://aws.amazon.com/ec2/capacityblocks/pricing, late in 2024.
    Machine("64 × H100 SXM", 64, 989.4e12, 3.35e12, 450e9, 50e9, 4.916),
)


class Network(NamedTuple):
    """A backbone with the hash head."""

    name: str
    pixels: int
    flops: float
    """FLOPs of the forward pass of one view."""
    bytes: float
    """Bytes that all operations read and write in bfloat16, without fusion."""
    features: int


def networks() -> list[Network]:
    """Returns the networks with their FLOPs, as XLA counts them in the program for an accelerator."""
    import jax
    import jax.numpy as jnp

    import cib_jax as cib

    found = []
    for name, pixels in (("efficientnet_lite0", 128), ("vgg16", 224)):
        encoder, params, frozen = cib.create_encoder(
            jax.random.key(0), backbone=name, bits=BITS, frozen=True, pretrained=False, image_size=pixels
        )
        traced = jax.jit(encoder.features).trace
        one, two = (
            traced(params, frozen, jax.ShapeDtypeStruct((views, pixels, pixels, 3), jnp.float32))
            .lower(lowering_platforms=("tpu",))
            .cost_analysis()
            for views in (1, 2)
        )
        # The cost of a second view, since weights are read once per batch; bfloat16 has half of float32's bytes.
        moved = (two["bytes accessed"] - one["bytes accessed"]) / 2
        found.append(Network(name, pixels, two["flops"] - one["flops"], moved, encoder.backbone.features))
    return found


def head_parameters(features: int, hidden: int = 1024) -> int:
    """Returns the number of parameters of the hash head."""
    return features * hidden + hidden + hidden * BITS + BITS


def sent(devices: int, parameters: int) -> int:
    """Returns the bytes that a device sends in a step with ring algorithms."""
    codes = VIEWS * BATCH * BITS * 4
    return sum(
        one.sent
        for one in (
            Collective("all-gather", codes, devices, 1, ""),
            Collective("reduce-scatter", codes // devices, devices, 1, ""),
            Collective("all-reduce", 4 * (parameters + 3), devices, 1, ""),
        )
    )


def epoch(machine: Machine, network: Network) -> list[list[str]]:
    """Returns the rows for an epoch of training the head on fresh views, and for encoding all images once."""
    parameters, devices = head_parameters(network.features), machine.devices
    steps = IMAGES // BATCH
    # The backward pass costs twice the forward pass; the frozen backbone has no backward pass.
    contrast = PASSES * 3 * 2 * (VIEWS * BATCH) ** 2 * BITS / BATCH
    trained = VIEWS * (network.flops + 3 * 2 * parameters) + contrast
    encoded = network.flops + 2 * parameters
    per_step = sent(devices, parameters)
    rows = [
        [
            "FLOPs per image, training, two views",
            f"{trained / 1e9:,.2f} G",
            f"contrastive loss {contrast / trained:.1%}",
        ],
        ["FLOPs per image, encoding", f"{encoded / 1e9:,.2f} G", ""],
        [
            "an epoch, if limited by memory bandwidth",
            f"{IMAGES * VIEWS * network.bytes / machine.memory / devices / 60:,.1f} min",
            f"{network.bytes / 1e6:,.0f} MB per view, without fusion",
        ],
    ]
    for part in UTILISATION:
        rate = machine.flops * devices * part
        hours, coding = IMAGES * trained / rate / 3600, IMAGES * encoded / rate / 3600
        cores = IMAGES / (hours * 3600) / DECODED[network.pixels]
        at = f"at {part:.0%} of the peak"
        cost = f"; {hours * devices * machine.price:,.0f} dollars" if machine.price else ""
        rows += [
            [f"an epoch, {at}", f"{hours * 60:,.1f} min", f"{hours * devices:,.1f} device hours{cost}"],
            [f"encoding, {at}", f"{coding * 60:,.1f} min", f"{coding * devices:,.1f} device hours"],
            [f"cores for decoding, {at}", f"{cores:,.0f}", f"{cores / devices:,.0f} per device"],
            [f"read from storage, {at}", f"{IMAGES * JPEG_BYTES / hours / 3600 / 1e9:,.0f} GB/s", "during an epoch"],
        ]
    links = [("the fast links", machine.inside)]
    links += [("the network between hosts", machine.across)] if machine.across < machine.inside else []
    rows.append([f"sent per device in a step of {BATCH:,}", f"{per_step / 1e6:,.1f} MB", f"{steps:,} steps per epoch"])
    for name, bandwidth in links:
        share = per_step / bandwidth / (BATCH * trained / (machine.flops * devices * UTILISATION[1]))
        note = f"{share:.1%} of a step at {UTILISATION[1]:.0%} of the peak"
        rows.append([f"… over {name}", f"{per_step / bandwidth * 1e3:,.2f} ms", note])
    return rows


def memory() -> list[list[str]]:
    """Returns the rows for memory and storage."""
    from cib_jax import losses

    rows = []
    for machine in MACHINES:
        count = VIEWS * BATCH // machine.devices * VIEWS * BATCH
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
    measuring.parser(__doc__ or "").parse_args(arguments)
    print(f"Estimates for {IMAGES:,} images, {BITS} bits, {BATCH:,} images per step\n")
    found = networks()
    for machine in MACHINES:
        for network in found:
            parameters = head_parameters(network.features)
            print(f"{machine.name}, {network.name} at {network.pixels} px, head of {parameters:,} parameters\n")
            measuring.print_table(["estimate", "value", ""], epoch(machine, network))
    measuring.print_table(["stored", "size", ""], memory())


if __name__ == "__main__":
    main()
