"""How a program ends: in a sentence and an exit code, alike in all processes of a run."""

import contextlib
import inspect
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn

from cib_jax import program
from cib_jax.devices import processes
from cib_jax.errors import Refusal
from cib_jax.jobs import preemption
from cib_jax.jobs import workdir as workdir_lib
from cib_jax.jobs.workdir import LAST_WORDS
from cib_jax.training.checkpoint import SaveError

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
            program.tell(program.says(words))

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
    except processes.SharedRefusal as error:
        words = str(error) if processes.first() else "refused; the first process says why"
        program.tell(program.says(words))
        sys.exit(2)
    except Refusal as error:
        # What is left of a save that failed, too, would tell of it while Python is taken down.
        at_once = _several() or isinstance(error, SaveError)
        _end(2, program.says(str(error)), at_once=at_once, workdir=workdir)
    except OSError as error:
        told = f"{error.filename or 'output'}: {error.strerror or error}; what was written before it is whole"
        _end(2, program.says(told), at_once=True, workdir=workdir)  # libraries would try to write once more
    except preemption.Preempted as error:
        _end(preemption.CODE, f"Stopped by SIGTERM: {error.message}; {goes_on}.", at_once=not _several())
    except KeyboardInterrupt:
        # At once: everything is written and closed by now, and XLA may crash if Python is taken down while it computes.
        _end(130, f"\nInterrupted; {goes_on}.", at_once=True, workdir=workdir)
    except Exception as error:
        if not _several():
            raise
        # An orderly end would wait for the others, who wait for this one.
        if not processes.is_loss_of_another(error):
            traceback.print_exc()
            _end(1, program.says("this process broke down, and the others with it"), at_once=True, workdir=workdir)
        time.sleep(1)  # what it ended with may be on its way
        code, told = _last_words(workdir) or (preemption.CODE, "it was killed, or its machine is gone")
        again = "; the same commands go on from the last checkpoint" if code == preemption.CODE else ""
        _end(code, program.says(f"another process of this run ended: {told}{again}"), at_once=True)


def _several() -> bool:
    with contextlib.suppress(RuntimeError, AssertionError):  # where JAX finds no device, there is no other process
        return processes.several()
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
        program.tell(program.says(f"another process of this run ended: {told}"))
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
    program.tell(message)
    sys.stdout.flush()
    if not at_once:
        sys.exit(code)
    _ENDING.set()
    if _several():
        if workdir and _last_words(workdir) is None:
            with contextlib.suppress(OSError):
                words = message.strip().removeprefix(program.says(""))
                workdir_lib.write_bytes(pathlib.Path(workdir) / LAST_WORDS, f"{code} {words}".encode())
        if processes.first():
            time.sleep(3 * LOOK_EVERY)  # JAX aborts the others as soon as the first one is gone
    os._exit(code)
