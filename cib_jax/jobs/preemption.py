"""SIGTERM, by which schedulers take a machine back: what is under way is saved, and the exit code says so."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from jax.experimental import multihost_utils

from cib_jax.devices import processes

CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on."""


class Preempted(SystemExit):
    """The job was asked to end and what it had done is on disk; the message says how far it came."""

    def __init__(self, message: str):
        super().__init__(CODE)
        self.message = message


def listen() -> None:
    """Has SIGTERM end this program as an exception that leaves what is written whole; for the main thread.

    Of several processes, JAX listens: one may be told alone, and they must stop at the same step.
    """
    if not processes.several():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    raise Preempted("nothing was left half done")


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether to stop, for a loop that can do so between two of its steps.

    While the context lasts, SIGTERM interrupts nothing. Of several processes, all must ask equally often, and are told
    at the same time.
    """
    if processes.several():
        asked = itertools.count()
        yield lambda: multihost_utils.reached_preemption_sync_point(next(asked))
        return
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if told.is_set():  # too late for the loop to hear
        raise Preempted("the loop had come to its end, which is saved")
