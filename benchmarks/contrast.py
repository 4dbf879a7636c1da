"""NT-Xent with the whole matrix of similarities and in blocks of rows: time and memory of a value with its gradient.

`python -m benchmarks.contrast`; each batch and form in a process of its own, since memory is only ever seen to grow.
"""

import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks import measuring
from cib_jax import losses

BITS = 64


def measure(batch: int, form: str) -> None:
    """Prints seconds of a step after the first, and the MiB that the process grew by."""
    if form == "whole":
        losses.MAX_SIMILARITIES = 1 << 62
    codes = jnp.sign(jax.random.normal(jax.random.key(0), (2, batch, BITS)))
    step = jax.jit(jax.value_and_grad(losses.nt_xent, argnums=(0, 1)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jax.block_until_ready(step(*codes))
    begun = time.perf_counter()
    jax.block_until_ready(step(*codes))
    seconds = time.perf_counter() - begun
    print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, before / 1024)


def main() -> None:
    """Reads the flags and measures."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096, 8192, 32768], help="images per batch")
    parser.add_argument("--one", nargs=2, metavar=("BATCH", "FORM"), help="measure one here, for the others' sake")
    flags = parser.parse_args()
    if flags.one:
        measure(int(flags.one[0]), flags.one[1])
        return
    print(measuring.machine("jax"), end="\n\n")
    rows = []
    for batch in flags.batches:
        for form in ("whole", "blocks"):
            if form == "whole" and batch > 8192:  # 2 × 4 × (2 × batch)² bytes: tens of gigabytes
                continue
            command = [sys.executable, "-m", "benchmarks.contrast", "--one", str(batch), form]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            rows.append(
                (
                    f"{batch:,}",
                    form,
                    f"{float(told[0]):.2f} s",
                    f"{float(told[1]):,.0f} MiB",
                    f"{float(told[2]):,.0f} MiB",
                )
            )
    measuring.print_table(("images", "form", "value and gradient", "memory it added", "before it"), rows)


if __name__ == "__main__":
    main()
