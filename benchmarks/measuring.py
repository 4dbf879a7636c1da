"""Timing in turns, which evens out drifts of the machine's speed; tables and flags of all benchmarks."""

import argparse
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Formatter = argparse.ArgumentDefaultsHelpFormatter


class Seconds(NamedTuple):
    """Seconds of one side in each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds)


def in_turns(sides: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int = 1) -> dict[str, Seconds]:
    """Returns the seconds of each side, run A B A B …, after `warm_up` rounds that do not count.

    A side must not return before its work is done: with JAX, end it with `block_until_ready`.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            begun = time.perf_counter()
            side()
            if number >= warm_up:
                taken[name].append(time.perf_counter() - begun)
    return {name: Seconds(tuple(seconds)) for name, seconds in taken.items()}


def ratio(slow: Seconds, fast: Seconds) -> tuple[float, float, float]:
    """Returns the minimum, median and maximum over the rounds of how many times faster `fast` is."""
    each = sorted(a / b for a, b in zip(slow.rounds, fast.rounds, strict=True))
    return each[0], statistics.median(each), each[-1]


def format_ratio(slow: Seconds, fast: Seconds) -> str:
    """Formats the median of `ratio` with its minimum and maximum, such as "2.31 (2.20–2.40)"."""
    least, median, most = ratio(slow, fast)
    return f"{median:.2f} ({least:.2f}–{most:.2f})"


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """Formats the mean of several seeds and their sample deviation, such as "0.575 ± 0.003"; one has none."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints an aligned Markdown table, readable on a terminal and in a document."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)


def machine(*packages: str) -> str:
    """Returns one line with the processor, the number of cores and the versions of Python and of `packages`."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
        model += " with AVX-512" if "avx512f" in flags else " without AVX-512" if "avx2" in flags else ""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return f"{model}, {cores()} cores, Python {platform.python_version()}, {versions}"


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parser(description: str, *modules: str) -> argparse.ArgumentParser:
    """Returns a parser of flags; exits with one sentence if a module of the other side is missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        print(f"this benchmark needs {', '.join(missing)}: pip install -e '.[benchmark]'", file=sys.stderr)
        sys.exit(2)
    return argparse.ArgumentParser(description=description, formatter_class=Formatter)
