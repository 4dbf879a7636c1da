"""Whether the Python that was started can run the program at all; old ones read this, too, so it is in their words."""

import importlib.util
import os
import signal
import sys
from typing import NoReturn

from cib_jax import console

OLDEST = (3, 11)
FIRST = ("absl", "jax", "ml_collections", "rich")
"""Of what is installed with it, what a start meets first: where these are, so is the rest, or pip said why not."""


def check_python() -> None:
    """Ends the program where Python is too old, or has none of the packages that it needs."""
    if sys.version_info < OLDEST:
        console.exit_with_error(
            f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, and {sys.executable} is {sys.version.split()[0]}; "
            "make the environment with a newer one, such as python3.11 -m venv .venv"
        )
    missing = [name for name in FIRST if importlib.util.find_spec(name) is None]
    if missing:
        console.exit_with_error(
            f"the packages that it needs ({missing[0]}, …) are not installed for {sys.executable}; start it with the "
            "Python of the environment where they are, such as .venv/bin/python, or pip install -r requirements.txt"
        )


def listen() -> None:
    """Has SIGTERM and Ctrl-C end the program in a sentence while it is loaded, which is seconds long."""
    signal.signal(signal.SIGTERM, end_early)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, end_early)


def end_early(number: int, *_: object) -> NoReturn:
    """Ends the program while nothing is begun."""
    interrupted = number == signal.SIGINT
    told = "before anything began; the same command starts again.\n"
    os.write(
        2,
        ("\nInterrupted " + told if interrupted else console.with_program_name("Stopped by SIGTERM " + told)).encode(),
    )
    os._exit(130 if interrupted else 75)  # 75 as `preemption.CODE`, which is not imported yet
