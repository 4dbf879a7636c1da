"""Transient messages on a terminal."""

import io
import threading

import pytest

from cib_jax import console as console_lib
from cib_jax.hint import Hint
from tests.test_console import Terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_a_hint_is_shown_on_a_terminal_and_removed_by_the_next_output(monkeypatch, terminal):
    hint, stderr = Hint(), Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(console_lib, "HINT", hint)
    monkeypatch.setattr("sys.stderr", stderr)
    hint.show("Loading " + "much " * 99, delay=0)
    wait_for_threads()
    shown = stderr.getvalue()
    assert shown.startswith("Loading much ") if terminal else shown == ""
    assert len(shown) < 120  # one line, so that it can be removed
    hint.show("Drawing")
    shown += "\r\x1b[KDrawing" if terminal else ""  # at once, in its place
    console_lib.print_error("run.py: done")
    assert stderr.getvalue() == shown + ("\r\x1b[K" if terminal else "") + "run.py: done\n"


def test_a_hint_that_is_cleared_in_time_never_appears(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    hint = Hint()
    hint.show("Loading", delay=0.05)
    hint.clear()
    wait_for_threads()
    assert stderr.getvalue() == ""


def wait_for_threads():
    """Waits for the timers of hints."""
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()
