"""What the program says on a terminal: lines broken between words, and words that go again."""

import io
import itertools
import re

import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from cib_jax import console as console_lib

WORD = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=50)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@given(st.lists(WORD, min_size=1, max_size=30), st.integers(10, 120))
def test_lines_are_broken_between_words_alone(words, width):
    lines = console_lib.wrap_words(" ".join(words), width).split("\n")
    assert [word for line in lines for word in line.split(" ")] == words
    for line, after in itertools.pairwise(lines):
        assert len(line) <= width or " " not in line
        assert len(line) + 1 + len(after.split(" ")[0]) > width  # no line ends too early


def test_a_sentence_is_broken_on_a_terminal_and_stays_one_line_in_a_file():
    sentence = "Written to runs/" + "long-name/" * 9 + "results.json, where it stays until it is removed, or made anew"
    for terminal in (True, False):
        console = rich.console.Console(file=io.StringIO(), width=80, force_terminal=terminal)
        console_lib.print_message(console, sentence)
        lines = console.file.getvalue().splitlines()
        assert re.split(r"\s", " ".join(lines)) == sentence.split(" ")
        assert len(lines) == (3 if terminal else 1)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_hint_is_for_a_terminal_and_goes_again(monkeypatch, terminal):
    hint, stderr = console_lib.Hint(), Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(console_lib, "HINT", hint)
    monkeypatch.setattr("sys.stderr", stderr)
    hint.show("Loading " + "much " * 99)
    hint._show()  # as the timer does
    shown = stderr.getvalue()
    assert shown.startswith("Loading much ") if terminal else shown == ""
    assert len(shown) < 120  # it must stay on one line to be taken away
    console_lib.print_error("run.py: done")
    assert stderr.getvalue() == shown + ("\r\x1b[K" if terminal else "") + "run.py: done\n"
    hint._show()
    assert stderr.getvalue().endswith("run.py: done\n")
