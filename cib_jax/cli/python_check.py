"""Checks that run before anything else is imported. Uses only syntax that old Python versions can parse."""

import importlib.util
import os
import signal
import sys
from typing import NoReturn, Tuple  # noqa: UP035 - tuple[int, int] fails before Python 3.9

OLDEST = (3, 11)
FIRST_IMPORTS = ("absl", "jax", "ml_collections", "rich")
"""The first third-party imports; if these are present, the installation is assumed to be complete."""

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 75  # the exit code of a run that was saved on SIGTERM, too


def check_python(oldest: Tuple[int, int] = OLDEST) -> None:  # noqa: UP006
    """Ends the program if Python is too old, or if required packages are not installed."""
    if sys.version_info < oldest:
        _exit(
            f"Python {oldest[0]}.{oldest[1]} or newer is needed, but {sys.executable} is {sys.version.split()[0]}; "
            "create the environment with a newer one, such as python3.11 -m venv .venv"
        )
    missing = [name for name in FIRST_IMPORTS if importlib.util.find_spec(name) is None]
    if missing:
        _exit(
            f"the required packages ({missing[0]}, …) are not installed for {sys.executable}; start the program with "
            "the Python of the environment that has them, such as .venv/bin/python, or pip install -r requirements.txt"
        )


def _name() -> str:
    return sys.argv[0] if sys.argv[0] in ("cib-jax", "python -m cib_jax") else "run.py"


def _exit(message: str) -> NoReturn:
    sys.stderr.write(f"{_name()}: {message}\n")
    sys.exit(2)


def handle_early_signals() -> None:
    """Makes SIGTERM and Ctrl-C end the program with one sentence during the seconds that imports take."""
    signal.signal(signal.SIGTERM, end_early)
    # Ctrl-C may be ignored, as in the background jobs of a shell script; then it stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_early)


def end_early(number: int, *_: object) -> NoReturn:
    """Ends the program before any work has begun."""
    interrupted = number == signal.SIGINT
    cause = "\nInterrupted" if interrupted else f"{_name()}: Stopped by SIGTERM"
    os.write(2, f"{cause} before anything began; the same command starts again.\n".encode())
    os._exit(EXIT_INTERRUPTED if interrupted else EXIT_TERMINATED)
