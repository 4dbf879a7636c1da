"""Training steps on a whole batch at once and in parts of it (`config.micro_batch`): time and memory.

`python -m benchmarks.accumulation`; memory is what the compiled program allocates in addition to its arguments.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cib_jax as cib
from benchmarks import measuring
from cib_jax.models import registry

BITS = 64


def prepare_steps(
    backbone: str, size: int, batch: int, frozen: bool
) -> Callable[[int], tuple[Callable[[], Any], float]]:
    """Returns a function that maps the images of a part (0: all) to a blocking step and the MiB that it allocates."""
    encoder, params, unchanging = cib.create_encoder(
        jax.random.key(0), backbone=backbone, bits=BITS, image_size=size, pretrained=False, frozen=frozen
    )
    optimizer = optax.adam(1e-3)
    state = cib.create_train_state(params, optimizer)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8))
    arguments = state, unchanging, images, jax.random.key(1)

    def for_part(micro_batch: int) -> tuple[Callable[[], Any], float]:
        step = functools.partial(cib.train_step, encoder=encoder, optimizer=optimizer, micro_batch=micro_batch)
        program = jax.jit(step).lower(*arguments).compile()
        taken = program.memory_analysis().temp_size_in_bytes / 2**20
        return lambda: jax.block_until_ready(program(*arguments)), taken

    return for_part


def main() -> None:
    """Reads the flags and prints the table."""
    parser = measuring.parser(__doc__)
    parser.add_argument(
        "--backbone", default="convnet", choices=[name for name in registry.BACKBONES if name != "none"]
    )
    parser.add_argument("--image_size", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=512, help="images per step")
    parser.add_argument("--parts", type=int, nargs="+", default=[128, 32, 8], help="images at a time")
    parser.add_argument("--frozen", action="store_true", help="train the hash head alone")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    print(measuring.machine("jax"))
    print(f"{flags.backbone}{', frozen' * flags.frozen}, {flags.image_size} px, {flags.batch} images\n", flush=True)
    for_part = prepare_steps(flags.backbone, flags.image_size, flags.batch, flags.frozen)
    programs = {size: for_part(size) for size in (0, *flags.parts)}
    seconds = measuring.in_turns({str(size): step for size, (step, _) in programs.items()}, rounds=flags.rounds)
    rows = []
    for size, (_, taken) in programs.items():
        part, whole = seconds[str(size)], seconds["0"]
        rows.append(
            (
                size or "all",
                f"{part.median:.2f} s",
                measuring.format_ratio(part, whole),
                f"{taken:,.0f} MiB",
                f"{taken / programs[0][1]:.3f}",
            )
        )
    measuring.print_table(("images at a time", "step", "time / that of all", "memory", "memory / that of all"), rows)


if __name__ == "__main__":
    main()
