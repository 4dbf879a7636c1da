"""Which file --config means: one that comes along, by its name, or one of the user's own, by its path."""

import difflib
import itertools
import os
import pathlib
import re
import runpy
import sys
from collections.abc import Iterator, Sequence

from absl import flags

import cib_jax.configs
from cib_jax import console, errors
from cib_jax.cli.flags import DEFAULT_CONFIG, INDEX_CONFIG
from cib_jax.config.schema import flatten
from cib_jax.console import exit_with_error
from cib_jax.errors import ConfigError

# command.experiments: Which file --config means: one that comes along, by its name, or one of the user's own, by its path.


FOLDER = pathlib.Path(cib_jax.configs.__path__[0])


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
        raise ConfigError(
            f"--config: no experiment {given!r} comes along; {hint}A file is named as ./{given}.py; {there}"
        )
    if not os.path.isfile(given):
        raise ConfigError(f"--config: there is no file {given!r}; {there}")
    return given


# command.parsing: Command lines read: the experiment first, wherever it stands, then its fields and the flags.


def parse(arguments: Sequence[str]) -> list[str]:
    """Reads the flags and returns the program's name and the --config given, if any.

    A mistake in them ends the program with one sentence that names the flag.
    """
    path, others = _without_config(arguments)
    default = INDEX_CONFIG if _mode_of(others) == "index" else DEFAULT_CONFIG
    others = list(_with_show_named(others))
    try:
        file = path_of(default if path is None else path)
    except errors.ConfigError as error:
        exit_with_error(str(error))
    _check_fields(file, arguments)
    # First of all, wherever the user put it: its fields can be set only once it is read.
    # ml_collections looks for the fields in sys.argv itself.
    sys.argv[:] = [others[0], f"--config={file}", *others[1:]]
    console.HINT.clear()  # --help is printed here
    try:
        rest = flags.FLAGS(sys.argv)
    except (flags.Error, ValueError, TypeError) as error:
        exit_with_error(str(error).strip().splitlines()[0])
    if len(rest) > 1:
        exit_with_error(f"{rest[1]!r} is no flag; flags start with --, such as --config.bits=64")
    return [rest[0], *([path] if path is not None else [])]


def _mode_of(arguments: Sequence[str]) -> str:
    mode = "train"
    for argument, after in itertools.pairwise([*arguments, ""]):
        match = re.fullmatch(r"--?mode(?:=(.*))?", argument)
        if match:
            mode = match.group(1) if match.group(1) is not None else after
    return mode


def _with_show_named(arguments: Sequence[str]) -> Iterator[str]:
    """Yields the arguments, with a name for the contact sheet where --show has none."""
    for argument, after in itertools.pairwise([*arguments, "--"]):
        unnamed = argument in ("--show", "-show") and after.startswith("-")
        yield f"--show={_mode_of(arguments)}.png" if unnamed else argument


def _without_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the last --config given, None if there is none, and the other arguments."""
    path, others, waiting = None, [], False
    for argument in arguments:
        match = re.fullmatch(r"--?config(?:=(.*))?", argument)
        if waiting or (match and match.group(1) is not None):
            path = match.group(1) if match and not waiting else argument
            waiting = False
        elif match:
            waiting = True
        else:
            others.append(argument)
    if waiting:
        exit_with_error("--config: it wants an experiment, such as --config=cifar, or the path of one's file")
    return path, others


def _check_fields(path: str, arguments: Sequence[str]) -> None:
    """Refuses a config file that cannot be read, and fields that it does not have."""
    try:
        fields = flatten(runpy.run_path(path)["get_config"]())
    except Exception as error:  # it is the user's own Python file: anything may go wrong in it
        exit_with_error(f"--config: {path!r} is no experiment with a get_config() ({type(error).__name__}: {error})")
    groups = {name.rpartition(".")[0] for name in fields} - {""}
    for argument in arguments[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if not match or match.group(1) in fields:
            continue
        name = match.group(1)
        if name in groups:
            exit_with_error(f"--config.{name}: it is a group; set one of its fields, such as {_first_of(fields, name)}")
        near = [full for full in fields if full.endswith("." + name)] or difflib.get_close_matches(name, fields, 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        exit_with_error(f"--config.{name}: there is no such field; {hint}{_nearest(FOLDER)}/default.py has them all")


def _nearest(folder: pathlib.Path) -> pathlib.Path:
    """Returns a folder as the user would name it from here."""
    here = pathlib.Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _first_of(fields: dict, group: str) -> str:
    return next(name for name in fields if name.startswith(group + "."))
