"""Seconds and memory of each method of a comparison, each in a process of its own, with the features cached.

`python -m benchmarks.costs METHOD METHOD … --flag=--config=configs/digits.py`, with `--flag` for each flag of run.py. A
method may set fields, as in `compare.methods`. The seconds of learning are the `train_seconds` of a comparison; those
of the whole command also contain the start of Python, reading data and features, compiling and the evaluation. Memory
is the peak resident memory of the process.
"""

import csv
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import measuring

ROOT = pathlib.Path(__file__).parent.parent


def measure(method: str, bits: int, flags: list[str]) -> tuple[float, float, float]:
    """Returns the seconds of learning, those of the whole process, and its peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        fields = {
            "mode": "compare",
            "config.compare.methods": method,
            "config.compare.bits": bits,
            "config.compare.seeds": 0,
            "config.compare.workers": 1,
            "config.report.write": False,
            "workdir": folder,
        }
        command = [sys.executable, ROOT / "run.py", *(f"--{name}={value}" for name, value in fields.items()), *flags]
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=sys.stderr)
        _, status, usage = os.wait4(process.pid, 0)
        whole = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen does not see what wait4 has collected
        if process.returncode:
            sys.exit(f"{method} ended with status {process.returncode}; its message is above")
        with (pathlib.Path(folder) / "comparison.csv").open(encoding="utf-8") as file:
            [cell] = csv.DictReader(file)
    return float(cell["train_seconds"]), whole, usage.ru_maxrss / 1024


def main() -> None:
    """Reads the flags, measures the methods one after the other, and prints a table."""
    parser = measuring.parser(__doc__)
    parser.add_argument("methods", nargs="+", help="rows of a comparison")
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--flag", action="append", default=[], help="a flag of run.py, such as --flag=--config=digits")
    flags = parser.parse_args()
    measure(flags.methods[0], flags.bits, flags.flag)  # which leaves the features in the cache
    rows = []
    for method in flags.methods:
        learning, whole, memory = measure(method, flags.bits, flags.flag)
        rows.append((method, f"{learning:.1f}", f"{whole:.1f}", f"{memory:,.0f}"))
    print(measuring.machine("jax"), f"; {flags.bits} bits", flush=True)
    measuring.print_table(("method", "seconds of learning", "seconds of the whole command", "MiB at most"), rows)


if __name__ == "__main__":
    main()
