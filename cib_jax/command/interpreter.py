"""Whether the Python that was started can run the program at all; old ones read this, too, so it is in their words."""

import importlib.util
import sys

from cib_jax import program

OLDEST = (3, 11)
FIRST = ("absl", "jax", "ml_collections", "rich")
"""Of what is installed with it, what a start meets first: where these are, so is the rest, or pip said why not."""


def check() -> None:
    """Ends the program where Python is too old, or has none of the packages that it needs."""
    if sys.version_info < OLDEST:
        program.refuse(
            f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, and {sys.executable} is {sys.version.split()[0]}; "
            "make the environment with a newer one, such as python3.11 -m venv .venv"
        )
    missing = [name for name in FIRST if importlib.util.find_spec(name) is None]
    if missing:
        program.refuse(
            f"the packages that it needs ({missing[0]}, …) are not installed for {sys.executable}; start it with the "
            "Python of the environment where they are, such as .venv/bin/python, or pip install -r requirements.txt"
        )
