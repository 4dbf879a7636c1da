"""Output on a terminal and in a file: line breaks, progress bars."""

import io
import itertools
import json
import re
import time

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


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\rb", "a\udcffb", "a\u202eb"])
def test_text_that_controls_a_terminal_is_escaped(text):
    plain = console_lib.format_text(text).plain
    assert plain.isprintable() and plain.startswith("a") and plain.endswith("b")


@pytest.fixture
def console():
    return rich.console.Console(file=io.StringIO(), width=100)


def test_progress_lines_have_a_rate_and_the_time_left(monkeypatch, console):
    moments = iter([100.0, 100.0, *[110.0] * 3, *[120.0] * 3])
    monkeypatch.setattr(console_lib.time, "monotonic", lambda: next(moments))
    with console_lib.progress_bar(console, "Encoding", 4000, done=1000, interval=-1) as advance:
        advance(100)
        advance(2900)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "Encoding: 1,100 of 4,000, 10 images/s, 0:04:50 left"  # 2,900 images at 10 a second
    assert re.fullmatch(r"Encoding: 4,000 of 4,000, 1\d\d images/s", lines[1])


def test_steps_that_are_only_dispatched_have_no_rate(monkeypatch, console):
    moments = iter([100.0, 100.0, *[100.000001] * 2, *[110.0] * 5])
    monkeypatch.setattr(console_lib.time, "monotonic", lambda: next(moments))
    with console_lib.progress_bar(console, "Training", 400, interval=-1) as advance:
        advance(100, "loss 3")
        advance(100, "")
    assert [line.split(", ")[1] for line in console.file.getvalue().splitlines()] == ["loss 3", "20 images/s"]


def test_progress_in_a_file_prints_few_lines_and_always_the_last(console):
    with console_lib.progress_bar(console, "Encoding", 1000, interval=3600) as advance:
        for _ in range(1000):
            advance(1)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Encoding: 1,000 of 1,000")


@pytest.mark.parametrize("terminal", [False, True])
def test_work_after_a_full_bar_has_a_note_but_no_time_left_nor_a_rate(terminal):
    console = rich.console.Console(file=io.StringIO(), width=100, force_terminal=terminal)
    with console_lib.progress_bar(console, "Neighbors", 100, interval=3600) as advance:
        advance(100)
        for _ in range(50):
            advance(0, "modes of the walk")
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", console.file.getvalue()).split("\r")[-1].strip()
    if terminal:
        assert last.rstrip("-\\|/ ").endswith("100% modes of the walk")
    else:
        assert last == "Neighbors: 100 of 100"


@pytest.mark.parametrize(("delay", "shown"), [(3600, []), (1e-9, ["Encoding: 1,000 of 1,000"])])
def test_work_that_ends_before_the_delay_shows_nothing(console, delay, shown):
    with console_lib.progress_bar(console, "Encoding", 1000, interval=3600, delay=delay) as advance:
        for _ in range(10):
            advance(100)
    assert [line.partition(", ")[0] for line in console.file.getvalue().splitlines()] == shown


def bar_at_80_columns(monkeypatch, show=True, file=None):
    """Returns what the bar of a library's function leaves on stderr."""
    file = file or Terminal()
    for name, value in (("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", file)
    with console_lib.library_bar("Training", 40_000_000, show) as advance:
        time.sleep(0.21)  # a rate takes a fifth of a second
        advance(123_456, "epoch 12 loss 4.1234 kl 12.1234")
    return file.getvalue()


def test_a_bar_at_80_columns_shows_percent_rate_and_time_left(monkeypatch):
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", bar_at_80_columns(monkeypatch)).splitlines()[-1]
    last = last.rpartition("\r")[2]
    words = r"Training ━.* 0% epoch 12 loss 4\.1234 kl 12\.1234, [\d,]+ images/s (\d+:\d\d:\d\d|-:--:--) [-\\|/]"
    assert re.fullmatch(words, last.strip())
    assert len(last) <= 80


def test_the_librarys_bars_are_for_terminals_alone_and_can_be_silenced(monkeypatch):
    assert bar_at_80_columns(monkeypatch, file=io.StringIO()) == ""
    assert bar_at_80_columns(monkeypatch, show=False) == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_printing_never_fails(monkeypatch, encoding):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
    monkeypatch.setattr("sys.stdout", stdout)
    console, content = console_lib.on_stdout(None), {"path": "é×日\udcff\\udcff.jpg"}
    console_lib.print_message(console, "é×日.jpg, \\udcff")
    console.print("é×日\udcff")
    console_lib.print_json(console, content)
    stdout.flush()
    lines = stdout.buffer.getvalue().decode(encoding).splitlines()
    assert console_lib.on_stdout(console) is console
    assert len(lines) == 3 and lines[0].endswith(".jpg, \\udcff") and json.loads(lines[2]) == content
