"""Processes of one command: how they end, with one sentence and an exit code, and worker processes for many runs."""

import contextlib
import functools
import inspect
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NoReturn

import jax

from cib_jax import console, errors, files
from cib_jax.config import loaded_files
from cib_jax.distributed import multihost
from cib_jax.errors import DistributedError, SaveError, UserError

CLOSED_OUTPUT = 141
"""Exit code after the reader of the output has ended, as shells show it for a program that SIGPIPE ended."""

LAST_WORDS = ".last-words"
"""File with the exit code and message of a process that ended, so that its peers end in the same way."""

_ENDING = threading.Event()

POLL_SECONDS = 1.0  # interval at which a process checks whether another one has ended


def install_background_hooks() -> None:
    """Reports an exception of a library's own thread in one line.

    The main thread meets the same failure and reports it in a sentence of its own, so that a traceback adds nothing.
    """
    reported = set()

    def print_once(kind: type[BaseException], error: BaseException | None) -> None:
        if str(error) not in reported:
            reported.add(str(error))
            message = f"in the background: {kind.__name__}: {str(error).partition(chr(10))[0]}"
            console.print_error(console.with_program_name(message))

    def excepthook(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            sys.__excepthook__(kind, error or kind(), trace)
        else:
            print_once(kind, error)

    def unraisablehook(thrown: "sys.UnraisableHookArgs") -> None:
        # If one array of a checkpoint cannot be read, which is an error with a message of its own, Orbax closes its
        # event loop while it still reads others: their coroutines end, and TensorStore finds the loop closed.
        if not inspect.iscoroutine(thrown.object) and str(thrown.exc_value) != "Event loop is closed":
            print_once(thrown.exc_type, thrown.exc_value)

    sys.excepthook = excepthook
    sys.unraisablehook = unraisablehook  # for callbacks that nothing awaits, such as those of a save that failed
    threading.excepthook = lambda thrown: excepthook(thrown.exc_type, thrown.exc_value, thrown.exc_traceback)


@contextlib.contextmanager
def exit_on_error(remedy: str, workdir: str) -> Iterator[None]:
    """Ends the program with one sentence and an exit code if the command inside cannot go on.

    Exit codes: 2 for a user's mistake or a failed disk, 75 (EX_TEMPFAIL) if the same command can go on, 130 after
    Ctrl-C, 141 without a sentence if nobody reads the output any more, 1 if one of several processes breaks down.
    `remedy` is the advice to a user who interrupted the command.
    Several processes leave their last words to each other in `workdir`, which is "" for a single one.
    """
    try:
        yield
    except errors.SharedRefusal as error:
        message = str(error) if multihost.is_first_process() else "refused; the first process prints the reason"
        console.print_error(console.with_program_name(message))
        sys.exit(2)
    except UserError as error:
        # Otherwise a failed background save prints again during interpreter shutdown.
        at_once = _several() or isinstance(error, SaveError)
        _exit(2, console.with_program_name(str(error)), at_once=at_once, workdir=workdir)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and console.is_reader_gone():
            console.discard_output()
            _exit(CLOSED_OUTPUT, "its output is not read any more", at_once=True, workdir=workdir)
        message = f"{error.filename or 'output'}: {error.strerror or error}; files written before are intact"
        # At once: libraries would try to write again.
        _exit(2, console.with_program_name(message), at_once=True, workdir=workdir)
    except multihost.Preempted as error:
        _exit(multihost.PREEMPTED_CODE, f"Stopped by SIGTERM: {error.message}; {remedy}.", at_once=not _several())
    except KeyboardInterrupt:
        # At once: all files are written and closed, and XLA may crash if Python shuts down while it computes.
        _exit(130, f"\nInterrupted; {remedy}.", at_once=True, workdir=workdir)
    except Exception as error:
        if not _several():
            raise
        # At once: an orderly shutdown waits for the other processes, which wait for this one.
        if not multihost.is_peer_failure(error):
            traceback.print_exc()
            message = "this process broke down, and the others with it"
            _exit(1, console.with_program_name(message), at_once=True, workdir=workdir)
        time.sleep(1)  # the other process's last words may not be on the disk yet
        code, message = _read_last_words(workdir) or (multihost.PREEMPTED_CODE, "it was killed, or its machine is gone")
        again = "; the same commands continue from the last checkpoint" if code == multihost.PREEMPTED_CODE else ""
        _exit(code, console.with_program_name(f"another process of this run ended: {message}{again}"), at_once=True)


def _several() -> bool:
    # JAX raises these if it finds no device; then there is no other process.
    with contextlib.suppress(RuntimeError, AssertionError):
        return multihost.is_distributed()
    return False


def remove_last_words(workdir: str) -> None:
    """Removes the last words of an earlier start; called by the first process, before the others go on."""
    (pathlib.Path(workdir) / LAST_WORDS).unlink(missing_ok=True)


def end_with_peers(workdir: str) -> None:
    """Starts a thread that ends this process if another one leaves last words: this one might wait for it forever."""

    def poll() -> None:
        while (last_words := _read_last_words(workdir)) is None:
            time.sleep(POLL_SECONDS)
        if _ENDING.is_set():
            return  # these are the last words of this process itself
        code, message = last_words
        console.print_error(console.with_program_name(f"another process of this run ended: {message}"))
        os._exit(code)

    threading.Thread(target=poll, daemon=True).start()


def _read_last_words(workdir: str) -> tuple[int, str] | None:
    """Returns the exit code and message left by another process, None if there are none."""
    if not workdir:
        return None
    try:
        code, message = (pathlib.Path(workdir) / LAST_WORDS).read_text(encoding="utf-8").split(" ", 1)
        return int(code), message
    except (OSError, ValueError):
        return None


def _exit(code: int, message: str, *, at_once: bool, workdir: str = "") -> NoReturn:
    """Prints a message and ends the program; `at_once` skips Python's shutdown.

    The first of several processes to end leaves its last words in `workdir`.
    """
    if code != CLOSED_OUTPUT:  # which is no mistake
        console.print_error(message)
    sys.stdout.flush()
    if not at_once:
        sys.exit(code)
    _ENDING.set()
    if _several():
        if workdir and _read_last_words(workdir) is None:
            with contextlib.suppress(OSError):
                words = message.strip().removeprefix(console.with_program_name(""))
                files.write_bytes(pathlib.Path(workdir) / LAST_WORDS, f"{code} {words}".encode())
        if multihost.is_first_process():
            time.sleep(3 * POLL_SECONDS)  # JAX aborts the other processes as soon as the first one is gone
    os._exit(code)


# Worker processes of compare and tune.

WORKER_BYTES = 4 << 30  # memory allowed for each worker; a run on CIFAR-10 takes up to 3 GB


def worker_count(asked: int) -> int:
    """Returns the number of processes to start: `asked`, or for 0 as many as cores and memory allow."""
    if asked:
        return asked
    if jax.default_backend() != "cpu":
        return 1  # several would share the memory of one accelerator
    cores = files.core_count()
    # Two processes use two cores better than one process does; of many cores, each process gets two.
    return max(1, min(max(min(cores, 2), cores // 2), _free_bytes() // WORKER_BYTES))


def _free_bytes() -> int:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def set_compilation_cache(folder: str) -> None:
    """Lets JAX keep compiled programs in a folder, with checksums: a damaged one is compiled again.

    JAX compresses them by zstandard where that is installed, as it does so without checksums: with flipped bits in its
    files, 7 of 12 starts crashed. zlib, which it falls back on, has checksums.
    """
    from jax._src import compilation_cache

    for library in ("zstd", "zstandard"):
        if hasattr(compilation_cache, library):
            setattr(compilation_cache, library, None)
    jax.config.update("jax_compilation_cache_dir", folder)


def run(
    work: Callable[..., None], arguments: tuple[Any, ...], processes: int, receive: Callable[[int, Any], None]
) -> None:
    """Calls `work(*arguments, send)` in this process and in `processes` − 1 started ones; returns when all are done.

    `send(message)` has `receive(number of the process, message)` called in this process, whose number is 0. `work` must
    be importable by name, and must find out by locks what other processes are working on. If a started process breaks
    down, a DistributedError is raised.
    """
    context = multiprocessing.get_context("spawn")
    cache, loaded = jax.config.values["jax_compilation_cache_dir"], loaded_files()
    # A pipe for each: a process that is killed while it writes to a shared queue would block the others.
    pipes = [context.Pipe(duplex=False) for _ in range(processes - 1)]
    others = [
        context.Process(target=_work_in_child, args=(work, arguments, sending, cache, loaded, os.getpid()), daemon=True)
        for _, sending in pipes
    ]
    listener = threading.Thread(target=_listen, args=([receiving for receiving, _ in pipes], receive), daemon=True)
    # A terminal sends Ctrl-C to all processes. The started ones inherit that it is ignored, and this one ends them.
    # Only the main thread can set this; processes started by another thread receive Ctrl-C.
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        for process in others:
            process.start()
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    for _, sending in pipes:
        sending.close()  # the started process has it, and the pipe ends with that process
    listener.start()
    try:
        work(*arguments, functools.partial(receive, 0))
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()  # by SIGTERM, so that they release locks
        for process in others:
            process.join(timeout=10)
            process.kill()
        listener.join(timeout=10)
    if any(process.exitcode for process in others):
        raise DistributedError(
            "a worker process broke down, probably for lack of memory if nothing else is printed above; the same "
            "command continues, and config.compare.workers or config.tune.workers set to 1 needs less memory"
        )


def _listen(pipes: list[Connection], receive: Callable[[int, Any], None]) -> None:
    """Receives the messages of started processes until all have ended."""
    numbers = {pipe: number for number, pipe in enumerate(pipes, 1)}
    while numbers:
        for pipe in multiprocessing.connection.wait(list(numbers)):
            assert isinstance(pipe, Connection)
            try:
                receive(numbers[pipe], pipe.recv())
            except (EOFError, OSError):
                del numbers[pipe]


def _work_in_child(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    sending: Connection,
    cache: str | None,
    loaded: list[str],
    parent: int,
) -> None:
    def exit_with_parent() -> None:
        while os.getppid() == parent:  # it may die by SIGKILL
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    multihost.treat_hangup_as_sigterm()
    if cache and jax.config.values["jax_compilation_cache_dir"] is None:
        set_compilation_cache(cache)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    from cib_jax.config import extensions  # Flax and all else that training needs, which a search does not

    try:
        extensions.load(loaded)
        work(*arguments, sending.send)
    except KeyboardInterrupt:
        sys.exit(0)  # reported by the process that the user started
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
