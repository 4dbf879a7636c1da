"""How a program ends: in a sentence and an exit code, alike in all processes of a run."""

import contextlib
import inspect
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import jax

from cib_jax import console, errors
from cib_jax.distributed import multihost
from cib_jax.errors import DistributedError, SaveError, UserError
from cib_jax.runs.workdir import LAST_WORDS, exclusive, write_bytes

# jobs.endings: How a program ends: in a sentence and an exit code, alike in all processes of a run.


_ENDING = threading.Event()

LOOK_EVERY = 1.0
"""Seconds after which a process looks whether another has ended."""


def quieten_background() -> None:
    """Has what breaks in a library's own thread told in a line: the main thread meets it too, and says what to do."""
    told = set()

    def line(kind: type[BaseException], error: BaseException | None) -> None:
        if str(error) not in told:
            told.add(str(error))
            words = f"in the background: {kind.__name__}: {str(error).partition(chr(10))[0]}"
            console.print_error(console.with_program_name(words))

    def tell(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            sys.__excepthook__(kind, error or kind(), trace)
        else:
            line(kind, error)

    def unraisable(thrown: "sys.UnraisableHookArgs") -> None:
        # Where one array of a checkpoint cannot be read, which is refused in words of its own, Orbax closes its event
        # loop while others are still read: their coroutines end in it, and TensorStore finds it closed.
        if not inspect.iscoroutine(thrown.object) and str(thrown.exc_value) != "Event loop is closed":
            line(thrown.exc_type, thrown.exc_value)

    sys.excepthook = tell
    sys.unraisablehook = unraisable  # of callbacks that nobody waits for, as of a save that failed
    threading.excepthook = lambda thrown: tell(thrown.exc_type, thrown.exc_value, thrown.exc_traceback)


@contextlib.contextmanager
def in_words(goes_on: str, workdir: str) -> Iterator[None]:
    """Ends the program in a sentence and an exit code where a job cannot go on; `goes_on` says what takes it up.

    Args:
      goes_on: told to a user who interrupted it.
      workdir: where several processes leave word to each other; "" for one alone, or where none was given.
    """
    try:
        yield
    except errors.SharedRefusal as error:
        words = str(error) if multihost.is_first_process() else "refused; the first process says why"
        console.print_error(console.with_program_name(words))
        sys.exit(2)
    except UserError as error:
        # What is left of a save that failed, too, would tell of it while Python is taken down.
        at_once = _several() or isinstance(error, SaveError)
        _end(2, console.with_program_name(str(error)), at_once=at_once, workdir=workdir)
    except OSError as error:
        told = f"{error.filename or 'output'}: {error.strerror or error}; what was written before it is whole"
        _end(
            2, console.with_program_name(told), at_once=True, workdir=workdir
        )  # libraries would try to write once more
    except multihost.Preempted as error:
        _end(multihost.CODE, f"Stopped by SIGTERM: {error.message}; {goes_on}.", at_once=not _several())
    except KeyboardInterrupt:
        # At once: everything is written and closed by now, and XLA may crash if Python is taken down while it computes.
        _end(130, f"\nInterrupted; {goes_on}.", at_once=True, workdir=workdir)
    except Exception as error:
        if not _several():
            raise
        # An orderly end would wait for the others, who wait for this one.
        if not multihost.is_peer_failure(error):
            traceback.print_exc()
            _end(
                1,
                console.with_program_name("this process broke down, and the others with it"),
                at_once=True,
                workdir=workdir,
            )
        time.sleep(1)  # what it ended with may be on its way
        code, told = _last_words(workdir) or (multihost.CODE, "it was killed, or its machine is gone")
        again = "; the same commands go on from the last checkpoint" if code == multihost.CODE else ""
        _end(code, console.with_program_name(f"another process of this run ended: {told}{again}"), at_once=True)


def _several() -> bool:
    with contextlib.suppress(RuntimeError, AssertionError):  # where JAX finds no device, there is no other process
        return multihost.is_distributed()
    return False


def forget(workdir: str) -> None:
    """Removes what processes of an earlier start ended with; for the first process, before the others go on."""
    (pathlib.Path(workdir) / LAST_WORDS).unlink(missing_ok=True)


def watch(workdir: str) -> None:
    """Ends this process, from now on, with the words of another that ends of itself: it may wait for that one."""

    def look() -> None:
        while (found := _last_words(workdir)) is None:
            time.sleep(LOOK_EVERY)
        if _ENDING.is_set():
            return  # they are this one's own
        code, told = found
        console.print_error(console.with_program_name(f"another process of this run ended: {told}"))
        os._exit(code)

    threading.Thread(target=look, daemon=True).start()


def _last_words(workdir: str) -> tuple[int, str] | None:
    """Returns what another process ended with, None where it could say nothing."""
    if not workdir:
        return None  # not of what lies in the folder that this process was started in
    try:
        code, told = (pathlib.Path(workdir) / LAST_WORDS).read_text(encoding="utf-8").split(" ", 1)
        return int(code), told
    except (OSError, ValueError):
        return None


def _end(code: int, message: str, *, at_once: bool, workdir: str = "") -> NoReturn:
    """Ends the program with a message and an exit code; `at_once` without taking Python down first.

    Where several processes share `workdir`, the first that ends leaves word there; "" leaves none.
    """
    console.print_error(message)
    sys.stdout.flush()
    if not at_once:
        sys.exit(code)
    _ENDING.set()
    if _several():
        if workdir and _last_words(workdir) is None:
            with contextlib.suppress(OSError):
                words = message.strip().removeprefix(console.with_program_name(""))
                write_bytes(pathlib.Path(workdir) / LAST_WORDS, f"{code} {words}".encode())
        if multihost.is_first_process():
            time.sleep(3 * LOOK_EVERY)  # JAX aborts the others as soon as the first one is gone
    os._exit(code)


# jobs.workers: Many runs on one machine: as many processes as there is room for, each taking what nobody else is at.


WORKER_BYTES = 4 << 30
"""Memory that a process is reckoned to need; a run on CIFAR-10 takes 3 GB at most."""


Concluded = TypeVar("Concluded")


def worker_count(asked: int) -> int:
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


def run_to_end(
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
    except DistributedError as error:
        broken = error
    # What a process was at that broke down, or that was passed by while another was at it.
    work(*arguments, True)
    with exclusive(lock, wait=True):
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
        _terminate(others)
    if any(process.exitcode for process in others):
        raise DistributedError(
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


def _terminate(processes: Sequence[Any]) -> None:
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
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone, killed too hard to say so."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
