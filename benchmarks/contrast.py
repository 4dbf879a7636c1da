"""NT-Xent with the whole similarity matrix and in blocks of rows: time and memory of the value and its gradient.

`python -m benchmarks.contrast`; each batch and form in a new process, since the peak memory of a process never falls.
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
    """Prints the seconds of the second step, the MiB by which peak memory grew, and the MiB before."""
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
    """Reads the flags and prints the table."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096, 8192, 32768], help="images per batch")
    parser.add_argument(
        "--one", nargs=2, metavar=("BATCH", "FORM"), help="measure one case in this process (used internally)"
    )
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
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            rows.append(
                (
                    f"{batch:,}",
                    form,
                    f"{float(printed[0]):.2f} s",
                    f"{float(printed[1]):,.0f} MiB",
                    f"{float(printed[2]):,.0f} MiB",
                )
            )
    measuring.print_table(("images", "form", "value and gradient", "memory added", "memory before"), rows)


if __name__ == "__main__":
    main()
