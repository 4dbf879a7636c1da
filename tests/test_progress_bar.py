"""What is shown where the output is no terminal: a line now and then, with how fast and how long."""

import io
import re

import rich.console

from cib_jax import console as console_lib


def test_lines_tell_rate_and_time_left(monkeypatch):
    monkeypatch.setattr(console_lib, "LINE_EVERY", -1.0)
    moments = iter([100.0, 100.0, *[110.0] * 3, *[120.0] * 3])
    monkeypatch.setattr(console_lib.time, "monotonic", lambda: next(moments))
    console = rich.console.Console(file=io.StringIO(), width=100)
    with console_lib.progress_bar(console, "Encoding", 4000, done=1000) as moved:
        moved(100)
        moved(2900)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "Encoding: 1,100 of 4,000, 10 images/s, 0:04:50 left"  # 2,900 at 10 a second
    assert re.fullmatch(r"Encoding: 4,000 of 4,000, 1\d\d images/s", lines[1])


def test_steps_that_are_only_sent_on_their_way_have_no_rate(monkeypatch):
    """The first of a training took no time: 27 million images/s were told."""
    monkeypatch.setattr(console_lib, "LINE_EVERY", -1.0)
    moments = iter([100.0, 100.0, *[100.000001] * 2, *[110.0] * 5])
    monkeypatch.setattr(console_lib.time, "monotonic", lambda: next(moments))
    console = rich.console.Console(file=io.StringIO(), width=100)
    with console_lib.progress_bar(console, "Training", 400) as moved:
        moved(100, "loss 3")
        moved(100, "")
    assert [line.split(", ")[1] for line in console.file.getvalue().splitlines()] == ["loss 3", "20 images/s"]
