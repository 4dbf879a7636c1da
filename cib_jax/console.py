"""Output on a terminal or in a log: messages, JSON lines, errors, progress bars."""

import contextlib
import datetime
import io
import os
import select
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import rich.console
import rich.progress
import rich.table
import rich.text

from cib_jax.files import dump_json, printable
from cib_jax.hint import HINT

COMMAND, MODULE = "cib-jax", "python -m cib_jax"
"""Names of the installed program; `cib_jax.__main__` sets sys.argv[0] to one, which started processes inherit."""

LINE_INTERVAL = 10.0
"""Seconds between progress lines where the output is not a terminal; the first comes after a third of them."""


def with_program_name(message: str) -> str:
    """Returns the message preceded by the program's name as the user called it, as Unix tools print errors."""
    return f"{sys.argv[0] if sys.argv[0] in (COMMAND, MODULE) else 'run.py'}: {message}"


def wrap_words(text: str, width: int) -> str:
    """Returns text broken into lines between words, never inside a word, so that paths can be copied."""
    lines = text.split("\n")
    return "\n".join(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines)


def format_text(text: str) -> rich.text.Text:
    """Returns text, such as a path, with the characters escaped that would control a terminal."""
    return rich.text.Text(
        "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in printable(text))
    )


def print_message(console: rich.console.Console, sentence: str) -> None:
    """Prints a sentence without interpreting markup in it; on a terminal, lines are broken between words only."""
    HINT.clear()
    words = format_text(sentence)
    if console.is_terminal:
        words = rich.text.Text(wrap_words(words.plain, console.width))
    console.print(words, soft_wrap=True, markup=False, highlight=False, emoji=False)


def replace_unprintable() -> None:
    """Makes stdout print "?" for a character that its encoding lacks, such as ASCII's, instead of raising an error.

    Python itself makes stderr print an escape for it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


class _Stdout(rich.console.Console):
    """A console on stdout that leaves an error of a closed pipe to its caller, where rich would end the program."""

    def on_broken_pipe(self) -> None:
        """Raises the error again."""
        raise  # noqa: PLE0704 - rich calls this while it handles the error


def on_stdout(console: rich.console.Console | None) -> rich.console.Console:
    """Returns the console, or if it is None one on stdout, on which no character is an error."""
    if console is None:
        replace_unprintable()
    return console or _Stdout()


def is_reader_gone() -> bool:
    """Returns whether stdout is a pipe that nobody reads any more, as after `head` has printed its lines."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)  # errors alone
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file of the system, or closed
        return False


def discard_output() -> None:
    """Lets stdout write nowhere, so that Python's own flush at the end does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(console: rich.console.Console, content: dict[str, Any]) -> None:
    """Prints one line of JSON."""
    HINT.clear()
    # Directly to the file: the console would break and color the line.
    console.file.write(dump_json(content, ensure_ascii=not console.encoding.startswith("utf")) + "\n")
    console.file.flush()


def print_error(text: str) -> None:
    """Prints text to stderr; on a terminal, lines are broken between words only."""
    HINT.clear()
    if sys.stderr.isatty():
        text = wrap_words(text, shutil.get_terminal_size().columns)
    print(text, file=sys.stderr, flush=True)


def exit_with_error(message: str) -> NoReturn:
    """Prints a user's mistake in one sentence and ends the program with exit code 2."""
    print_error(with_program_name(message))
    sys.exit(2)


class LineSender(io.TextIOBase):
    """A file for a console that hands each line to a function; lines of progress bars come every second."""

    interval = 1.0

    def __init__(self, send: Callable[[str], None]) -> None:
        self._send = send

    def write(self, text: str) -> int:
        """Hands the lines on."""
        for line in filter(str.strip, text.splitlines()):
            self._send(line)
        return len(text)


class _TimeLeft(rich.progress.TimeRemainingColumn):
    """The time left of a bar that is not full."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        """Returns the time left."""
        return rich.text.Text() if task.finished else super().render(task)


@contextlib.contextmanager
def progress_bar(
    console: rich.console.Console,
    title: str,
    total: int,
    done: int = 0,
    *,
    interval: float = 0.0,
    unit: str = "images",
    delay: float = 0.0,
) -> Iterator[Callable[..., None]]:
    """Yields a function `advance(images, note="")` that moves a progress bar, with images/s and the time left.

    With 0 images, only the note is shown, without a rate. A full bar shows no time left: it may stay for work that
    follows, which the note names. `unit` is the word in place of images. Where the output is not a terminal, a line is
    printed every `interval` seconds instead; 0 takes `LINE_INTERVAL`. Work that takes less than `delay` seconds shows
    nothing.
    """
    if delay:
        begun, bar = time.monotonic(), None
        with contextlib.ExitStack() as stack:

            def advance_late(images: int, note: str = "") -> None:
                nonlocal bar, done
                if bar is None and time.monotonic() - begun > delay:
                    bar = stack.enter_context(progress_bar(console, title, total, done, interval=interval, unit=unit))
                done += images
                if bar is not None:
                    bar(images, note)

            yield advance_late
        return
    HINT.clear()
    interval = interval or getattr(console.file, "interval", LINE_INTERVAL)
    if console.is_terminal:
        # Only the bar gets narrower in a narrow terminal.
        left = _TimeLeft(table_column=rich.table.Column(no_wrap=True))
        bars = rich.progress.BarColumn(), rich.progress.TaskProgressColumn()
        spinner = rich.progress.SpinnerColumn("line", finished_text="")  # moves while a first step is compiled
        columns = (title, *bars, "{task.fields[note]}", left, spinner)
        # What is printed meanwhile goes above the bar, unless it goes elsewhere.
        with rich.progress.Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty()) as progress:
            task = progress.add_task(title, total=total, completed=done, note="")
            yield _with_rate(lambda images, note: progress.update(task, advance=images, note=note), unit)
        return
    begun = last_line = time.monotonic()
    done_before, wait = done, interval / 3

    def advance(images: int, note: str) -> None:
        nonlocal done, last_line, wait
        done += images
        if time.monotonic() - last_line > wait or (images and done >= total):
            last_line, wait = time.monotonic(), interval
            seconds = (last_line - begun) * (total - done) / max(done - done_before, 1)
            left = f", {datetime.timedelta(seconds=round(seconds))} left" if done < total else ""
            line = ", ".join(filter(None, (f"{title}: {done:,} of {total:,}", note)))
            console.print(f"{line}{left}", highlight=False, soft_wrap=True, markup=False)

    yield _with_rate(advance, unit)


def bar_console(show: bool = True) -> rich.console.Console:
    """Returns the console of a library's bars: stderr in terminals and notebooks, elsewhere one that prints nothing."""
    console = rich.console.Console(stderr=True)
    if console.is_jupyter:  # can overwrite a line, but rich's own bars for it need ipywidgets
        console = rich.console.Console(stderr=True, force_terminal=True, force_jupyter=False, width=80)
    return console if show and console.is_terminal else rich.console.Console(file=io.StringIO(), quiet=True)


def library_bar(
    title: str, total: int, show: bool = True, unit: str = "images", delay: float = 0.0
) -> contextlib.AbstractContextManager[Callable[..., None]]:
    """Returns a `progress_bar` on the console of a library's bars."""
    return progress_bar(bar_console(show), title, total, unit=unit, delay=delay)


def _with_rate(advance: Callable[[int, str], None], unit: str) -> Callable[..., None]:
    """Returns an `advance` function whose notes end in the images per second since now."""
    begun, total = time.monotonic(), 0

    def advance_with_rate(images: int, note: str = "") -> None:
        nonlocal total
        total += images
        seconds = time.monotonic() - begun
        # Steps that have only been dispatched so far took no time.
        rate = f"{total / seconds:,.0f} {unit}/s" if images and seconds > 0.2 else ""
        advance(images, ", ".join(filter(None, (note, rate))))

    return advance_with_rate
