"""A training step on the whole batch at once and in parts of it (`config.micro_batch`): time and memory.

`python -m benchmarks.accumulation`; memory is what the compiled program asks for beside its arguments.
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


def prepared(backbone: str, size: int, batch: int, frozen: bool) -> Callable[[int], tuple[Callable[[], Any], float]]:
    """Returns a function from a part's images (0: all) to a step that runs to its end, and the MiB that it takes."""
    encoder, params, unchanging = cib.create_encoder(
        jax.random.key(0), backbone=backbone, bits=BITS, image_size=size, pretrained=False, frozen=frozen
    )
    optimizer = optax.adam(1e-3)
    state = cib.create_train_state(params, optimizer)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8))
    arguments = state, unchanging, images, jax.random.key(1)

    def of_part(micro_batch: int) -> tuple[Callable[[], Any], float]:
        step = functools.partial(cib.train_step, encoder=encoder, optimizer=optimizer, micro_batch=micro_batch)
        program = jax.jit(step).lower(*arguments).compile()
        taken = program.memory_analysis().temp_size_in_bytes / 2**20
        return lambda: jax.block_until_ready(program(*arguments)), taken

    return of_part


def main() -> None:
    """Reads the flags and measures."""
    parser = measuring.parser(__doc__)
    parser.add_argument(
        "--backbone", default="convnet", choices=[name for name in registry.BACKBONES if name != "none"]
    )
    parser.add_argument("--image_size", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=512, help="images per step")
    parser.add_argument("--parts", type=int, nargs="+", default=[128, 32, 8], help="images at a time")
    parser.add_argument("--frozen", action="store_true", help="whether the hash head alone is trained")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    print(measuring.machine("jax"))
    print(f"{flags.backbone}{', frozen' * flags.frozen}, {flags.image_size} px, {flags.batch} images\n", flush=True)
    of_part = prepared(flags.backbone, flags.image_size, flags.batch, flags.frozen)
    programs = {size: of_part(size) for size in (0, *flags.parts)}
    seconds = measuring.in_turns({str(size): step for size, (step, _) in programs.items()}, rounds=flags.rounds)
    rows = []
    for size, (_, taken) in programs.items():
        mine, whole = seconds[str(size)], seconds["0"]
        rows.append(
            (
                size or "all",
                f"{mine.median:.2f} s",
                measuring.told_ratio(mine, whole),
                f"{taken:,.0f} MiB",
                f"{taken / programs[0][1]:.3f}",
            )
        )
    measuring.print_table(("images at a time", "step", "of the whole's time", "memory", "of the whole's"), rows)


if __name__ == "__main__":
    main()
