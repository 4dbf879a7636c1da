"""What the program is called where it tells a user something, and its end for a mistake in the flags."""

import pathlib
import sys
from typing import NoReturn

INSTALLED = "cib_jax"
"""What `python -m cib_jax` writes into sys.argv, which processes that it starts inherit."""


def name() -> str:
    """Returns "run.py", or "cib_jax" where that was started."""
    return INSTALLED if pathlib.Path(sys.argv[0]).name == INSTALLED else "run.py"


def says(message: str) -> str:
    """Returns the message as a line of the program."""
    return f"{name()}: {message}"


def refuse(message: str) -> NoReturn:
    """Ends the program for a user's mistake: one sentence, no traceback."""
    print(says(message), file=sys.stderr)
    sys.exit(2)
