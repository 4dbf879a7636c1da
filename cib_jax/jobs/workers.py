"""Many runs on one machine: as many processes as there is room for, each taking what nobody else is at."""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from cib_jax.errors import Refusal
from cib_jax.jobs import workdir

WORKER_BYTES = 4 << 30
"""Memory that a process is reckoned to need; a run on CIFAR-10 takes 3 GB at most."""


Concluded = TypeVar("Concluded")


class WorkerError(Refusal):
    """A process of this machine ended before its work was done."""


def room(asked: int) -> int:
    """Returns how many processes to start: `asked`, or for 0 what cores and memory allow."""
    if asked:
        return asked
    if jax.default_backend() != "cpu":
        return 1  # they would share one accelerator's memory
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Two processes keep two cores busier than one that uses both; of many cores, each process takes some.
    return max(1, min(max(min(cores, 2), cores // 2), _free_bytes() // WORKER_BYTES))


def _free_bytes() -> int:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def to_the_end(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    processes: int,
    lock: pathlib.Path,
    conclude: Callable[[], tuple[Concluded, bool]],
) -> Concluded:
    """Does all work that nobody else is at, and returns what `conclude` makes of what is there then.

    Args:
      work: see `run`.
      arguments: the same.
      processes: the same.
      lock: a file; of several processes that come to the end together, one concludes at a time.
      conclude: tells also whether everything is there.

    Raises:
      WorkerError: a process broke down and something is missing; what is there was concluded.
    """
    broken = None
    try:
        run(work, arguments, processes)
    except WorkerError as error:
        broken = error
    # What a process was at that broke down, or that was passed by while another was at it.
    work(*arguments, True)
    with workdir.alone(lock, wait=True):
        concluded, whole = conclude()
    if broken and not whole:
        raise broken
    return concluded


def run(work: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    """Calls `work(*arguments, first)` here, and in `processes` − 1 more processes; returns when all are done.

    `first` is True here alone, where something may be shown. `work` must be importable by name, and must find out by
    itself, by locks, what the others are at.

    Raises:
      WorkerError: one of the other processes broke down.
    """
    context = multiprocessing.get_context("spawn")
    cache = jax.config.values["jax_compilation_cache_dir"]
    others = [
        context.Process(target=_other, args=(work, arguments, cache, os.getpid()), daemon=True)
        for _ in range(processes - 1)
    ]
    with _deaf_to_interruption():
        for process in others:
            process.start()
    try:
        work(*arguments, True)
        for process in others:
            process.join()
    finally:
        _end(others)
    if any(process.exitcode for process in others):
        raise WorkerError(
            "a process that was at work beside this one broke down, out of memory if nothing else is told above; the "
            "same command goes on, with config.compare.workers or config.tune.workers at 1 in less memory"
        )


@contextlib.contextmanager
def _deaf_to_interruption() -> Iterator[None]:
    """Has processes that start meanwhile ignore Ctrl-C, which a terminal sends to all: this one will end them.

    Only the main thread may say so; started from another, they hear it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heard or signal.SIG_DFL)


def _end(processes: Sequence[Any]) -> None:
    """Ends processes that are still at work: asked first, so that they give back what they hold, then made to."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(timeout=10)
        process.kill()


def _asked_to_end(*_: object) -> None:
    sys.exit(0)


def _other(work: Callable[..., None], arguments: tuple[Any, ...], cache: str | None, parent: int) -> None:
    signal.signal(signal.SIGTERM, _asked_to_end)
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        work(*arguments, False)
    except KeyboardInterrupt:
        sys.exit(0)  # told by the process that the user started
    except Refusal as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone, killed too hard to say so."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
