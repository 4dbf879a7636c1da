"""run.py in the test's own process, for what it refuses: a start of its own would take seconds and show no more."""

import signal
import sys
import threading

import pytest
from absl.testing import flagsaver

from cib_jax.cli import main, parsing
from tests.end_to_end.processes import ROOT


@pytest.fixture
def refusal(monkeypatch, capsys):
    """A function that gives run.py arguments which it must refuse, in one sentence, and returns that sentence."""
    for place, hook in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(place, hook, getattr(place, hook))  # which run.py replaces
    monkeypatch.chdir(ROOT)
    heard = signal.getsignal(signal.SIGTERM)

    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
            main.main(parsing.parse(sys.argv))
        assert ended.value.code == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1
        return error

    yield refused
    signal.signal(signal.SIGTERM, heard)
