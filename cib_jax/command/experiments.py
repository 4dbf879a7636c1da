"""Which file --config means: one that comes along, by its name, or one of the user's own, by its path."""

import difflib
import os
import pathlib
import re

import cib_jax.configs
from cib_jax.errors import Refusal

FOLDER = pathlib.Path(cib_jax.configs.__path__[0])


class ExperimentError(Refusal):
    """There is no such experiment."""


def names() -> list[str]:
    """Returns the names of those that come along."""
    return sorted(file.stem for file in FOLDER.glob("[!_]*.py"))


def path_of(given: str) -> str:
    """Returns the path of an experiment's file.

    Args:
      given: a name, which is one word; anything with a dot or a slash is a path.

    Raises:
      ExperimentError: there is none.
    """
    there = f"by name there are {', '.join(names())}"
    if re.fullmatch(r"\w+", given):
        if given in names():
            return str(FOLDER / f"{given}.py")
        near = difflib.get_close_matches(given, names(), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ExperimentError(
            f"--config: no experiment {given!r} comes along; {hint}A file is named as ./{given}.py; {there}"
        )
    if not os.path.isfile(given):
        raise ExperimentError(f"--config: there is no file {given!r}; {there}")
    return given
