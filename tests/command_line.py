"""The command line in the test's own process: a process of its own would take seconds and show no more."""

import contextlib
import os
import pathlib
import signal
import sys
import threading
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@contextlib.contextmanager
def signal_once(number, condition):
    """Sends this process a signal as soon as a condition holds, while the context lasts."""
    over = threading.Event()

    def watch():
        while not over.wait(0.002):
            if condition():
                os.kill(os.getpid(), number)
                return

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    error: str


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """A function that runs a command line in the repository's root, as run.py does, and returns how it ended."""
    import grain  # noqa: F401 - it defines flags, which would be forgotten if it were imported while a command runs
    from absl.testing import flagsaver

    from cib_jax.cli import main, parsing

    def exit_now(code):  # in place of os._exit
        raise SystemExit(code)

    def run(*arguments):
        capsys.readouterr()
        code = 0
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        try:
            with flagsaver.flagsaver():
                main.main(parsing.parse(sys.argv))
        except SystemExit as end:
            code = end.code or 0
        return Ended(code, *capsys.readouterr())

    for place, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(place, name, getattr(place, name))  # restored after the test
    monkeypatch.setattr(os, "_exit", exit_now)
    monkeypatch.chdir(ROOT)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    # Tests may be started where they are ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refusal(run_cli):
    """A function that runs a command line which must be refused in one sentence, and returns that sentence."""

    def refuse(*arguments):
        code, out, error = run_cli(*arguments)
        assert (code, len(error.strip().splitlines())) == (2, 1), (out, error)
        assert error.startswith("run.py: ")
        return error.strip()

    return refuse
