"""What the program is called where it tells a user something, and its end for a mistake in the flags."""

import contextlib
import datetime
import json
import pathlib
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import rich.console
import rich.progress
import rich.text

from cib_jax.files import printable


def print_message(console: rich.console.Console, sentence: str) -> None:
    """Prints a sentence, whatever is in it, on one line; a terminal's are broken between words, never in a path."""
    HINT.clear()
    words = format_text(sentence)
    if console.is_terminal:
        words = rich.text.Text(wrap_words(words.plain, console.width))
    console.print(words, soft_wrap=True, markup=False, highlight=False, emoji=False)


def print_json(console: rich.console.Console, content: dict[str, Any]) -> None:
    """Prints a line of JSON."""
    HINT.clear()
    # Past the console, which would break and color it.
    console.file.write(json.dumps(content, ensure_ascii=False) + "\n")
    console.file.flush()


def format_text(path: str) -> rich.text.Text:
    """Returns a path, or words with one, as they are, but for characters that would command a terminal."""
    plain = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in printable(path))
    return rich.text.Text(plain)


# program: What the program is called where it tells a user something, and its end for a mistake in the flags.

INSTALLED = "cib_jax"
"""What `python -m cib_jax` writes into sys.argv, which processes that it starts inherit."""


def program_name() -> str:
    """Returns "run.py", or "cib_jax" where that was started."""
    return INSTALLED if pathlib.Path(sys.argv[0]).name == INSTALLED else "run.py"


def with_program_name(message: str) -> str:
    """Returns the message as a line of the program."""
    return f"{program_name()}: {message}"


def wrap_words(text: str, width: int) -> str:
    """Returns text in lines of a width, broken between words and never in one: a path can be copied."""
    lines = text.split("\n")
    return "\n".join(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines)


class Hint:
    """Words on a terminal while something takes long, which go again; elsewhere nothing is shown."""

    AFTER = 1.0
    """Seconds; what is faster needs no words."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._words = ""
        self._shown = False

    def show(self, words: str) -> None:
        """Shows words, soon, unless `clear` comes first."""
        self._words = words
        timer = threading.Timer(self.AFTER, self._show)
        timer.daemon = True
        timer.start()

    def clear(self) -> None:
        """Takes the words away, or sees to it that they do not come."""
        with self._lock:
            self._words = ""
            if self._shown:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
                self._shown = False

    def _show(self) -> None:
        with self._lock:
            if self._words and not self._shown and sys.stderr.isatty():
                self._shown = True
                sys.stderr.write(self._words[: shutil.get_terminal_size().columns - 1])
                sys.stderr.flush()


HINT = Hint()
"""The program's one."""


def print_error(text: str) -> None:
    """Prints text to stderr: on a terminal broken between words and never in a path, elsewhere as it is."""
    HINT.clear()
    if sys.stderr.isatty():
        text = wrap_words(text, shutil.get_terminal_size().columns)
    print(text, file=sys.stderr, flush=True)


def exit_with_error(message: str) -> NoReturn:
    """Ends the program for a user's mistake: one sentence, no traceback."""
    print_error(with_program_name(message))
    sys.exit(2)


# jobs.progress: What a job shows while it works: bars on a terminal, a line now and then in a log.


LINE_EVERY = 10.0
"""Seconds between lines where the output is no terminal; the first comes after a third of them."""

RATED_AFTER = 0.2
"""Seconds after which images/s are told."""


@contextlib.contextmanager
def progress_bar(
    console: rich.console.Console, what: str, total: int, done: int = 0
) -> Iterator[Callable[[int, str], None]]:
    """Yields a function of (images more, words about them) that moves a bar on, with images/s and the time left."""
    HINT.clear()
    if console.is_terminal:
        columns = (
            rich.progress.TextColumn(what),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[words]}"),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=console) as progress:
            task = progress.add_task(what, total=total, completed=done, words="")
            moved = _rated(lambda more, words: progress.update(task, advance=more, words=words))
            yield moved
        return
    told = begun = time.monotonic()
    before, wait = done, LINE_EVERY / 3

    def line(more: int, words: str) -> None:
        nonlocal done, told, wait
        done += more
        if time.monotonic() - told > wait or done >= total:
            told, wait = time.monotonic(), LINE_EVERY
            seconds = (told - begun) * (total - done) / max(done - before, 1)
            left = f", {datetime.timedelta(seconds=round(seconds))} left" if done < total else ""
            told_of = ", ".join(filter(None, (f"{what}: {done:,} of {total:,}", words)))
            console.print(f"{told_of}{left}", highlight=False, soft_wrap=True, markup=False)

    yield _rated(line)


def _rated(show: Callable[[int, str], None]) -> Callable[[int, str], None]:
    begun, images = time.monotonic(), 0

    def moved(more: int, words: str = "") -> None:
        nonlocal images
        images += more
        seconds = time.monotonic() - begun
        # Steps that are only sent on their way took no time.
        rate = f"{images / seconds:,.0f} images/s" if seconds > RATED_AFTER else ""
        show(more, ", ".join(filter(None, (words, rate))))

    return moved
