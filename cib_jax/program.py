"""What the program is called where it tells a user something, and its end for a mistake in the flags."""

import pathlib
import shutil
import sys
import textwrap
import threading
from typing import NoReturn

INSTALLED = "cib_jax"
"""What `python -m cib_jax` writes into sys.argv, which processes that it starts inherit."""


def name() -> str:
    """Returns "run.py", or "cib_jax" where that was started."""
    return INSTALLED if pathlib.Path(sys.argv[0]).name == INSTALLED else "run.py"


def says(message: str) -> str:
    """Returns the message as a line of the program."""
    return f"{name()}: {message}"


def broken(text: str, width: int) -> str:
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


def tell(text: str) -> None:
    """Prints text to stderr: on a terminal broken between words and never in a path, elsewhere as it is."""
    HINT.clear()
    if sys.stderr.isatty():
        text = broken(text, shutil.get_terminal_size().columns)
    print(text, file=sys.stderr, flush=True)


def refuse(message: str) -> NoReturn:
    """Ends the program for a user's mistake: one sentence, no traceback."""
    tell(says(message))
    sys.exit(2)
