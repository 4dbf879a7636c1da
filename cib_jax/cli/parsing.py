"""Command-line parsing: the config file first, wherever it stands, then its fields and the flags."""

import itertools
import os
import pathlib
import re
import runpy
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from absl import flags

import cib_jax.configs
from cib_jax import console
from cib_jax.cli.flags import CONFIG, DEFAULT_CONFIG, INDEX_CONFIG, MODES, STARTING
from cib_jax.config import flatten
from cib_jax.console import exit_with_error
from cib_jax.errors import ConfigError
from cib_jax.files import did_you_mean
from cib_jax.hint import HINT
from cib_jax.version import __version__

CONFIGS = pathlib.Path(cib_jax.configs.__path__[0])
"""The folder of the experiments that are distributed with the package."""


def config_names() -> list[str]:
    """Returns the names of the experiments that are distributed with the package."""
    return sorted(file.stem for file in CONFIGS.glob("[!_]*.py"))


def config_path(given: str) -> str:
    """Returns the path of a config file, given as an experiment's name, one word, or as a path with a dot or slash."""
    names = config_names()
    if re.fullmatch(r"\w+", given):
        if given in names:
            return str(CONFIGS / f"{given}.py")
        raise ConfigError(
            f"--config: there is no experiment {given!r}; {did_you_mean(given, names)}choose one of "
            f"{', '.join(names)}, or give a file as ./{given}.py",
            "--config",
        )
    if not os.path.isfile(given):
        raise ConfigError(
            f"--config: there is no file {given!r}; give an existing file, or one of the names {', '.join(names)}",
            "--config",
        )
    return given


def parse(arguments: Sequence[str]) -> list[str]:
    """Parses the flags; returns the program's name and the value of --config, if it was given.

    A mistake ends the program with one sentence that names the flag.
    """
    arguments = _with_mode(arguments)
    if {"-h", "-help", "--help"} & {*arguments}:
        HINT.clear()
        try:
            print(help_text(_mode_of(arguments, "")), flush=True)
        except BrokenPipeError:  # of a reader, such as head, that has seen enough
            console.discard_output()
        sys.exit(0)
    if "--version" in arguments:
        HINT.clear()
        print(f"cib-jax {__version__}")
        sys.exit(0)
    given, others = _split_config(arguments)
    if (mode := _mode_of(others)) not in MODES:
        exit_with_error(f"--mode: there is no mode {mode!r}; {did_you_mean(mode, MODES)}modes are {', '.join(MODES)}")
    default = INDEX_CONFIG if mode == "index" else DEFAULT_CONFIG
    others = list(_with_sheet_name(others))
    try:
        file = config_path(default if given is None else given)
    except ConfigError as error:
        exit_with_error(str(error))
    _validate_fields(file, arguments)
    # --config comes first: its fields become flags only once the file is read. ml_collections reads the overrides of
    # fields from sys.argv itself.
    sys.argv[:] = [others[0], f"--config={file}", *others[1:]]
    HINT.clear()  # --helpfull is printed here
    try:
        rest = flags.FLAGS(sys.argv)
    except flags.UnrecognizedFlagError as error:
        name, fields = error.flagname, flatten(CONFIG.value)
        near = [name] if name in fields else [field for field in fields if field.endswith(f".{name}")]
        hint = f"did you mean --config.{' or --config.'.join(near)}? "
        hint = hint if near else did_you_mean(f"--{name}", [f"--{flag}" for flag in own_flags()])
        exit_with_error(f"--{name}: there is no such flag; {hint}--help lists all of them")
    except flags.IllegalFlagValueError as error:
        exit_with_error(_of_the_wrong_type(error))
    except (flags.Error, ValueError, TypeError) as error:
        if flag := re.fullmatch(r"Missing value for flag (\S+)", str(error)):
            exit_with_error(f"{flag[1]}: its value is missing; give {flag[1]}=VALUE")
        exit_with_error(str(error).strip().splitlines()[0])
    if len(rest) > 1:
        exit_with_error(f"{rest[1]!r} is not a flag; flags start with --, such as --config.bits=64")
    return [rest[0], *([given] if given is not None else [])]


def _of_the_wrong_type(error: flags.IllegalFlagValueError) -> str:
    """Returns a sentence for absl's error, which quotes Python's; its form is `flag --NAME=VALUE: REASON`."""
    name, _, rest = str(error).removeprefix("flag --").partition("=")
    value, flag = rest.removesuffix(f": {error.__context__}"), flags.FLAGS[name]
    allowed = {"int": "a whole number", "float": "a number", "bool": "True or False"}.get(flag.flag_type())
    if isinstance(flag.parser, flags.EnumParser):
        allowed = f"one of {', '.join(flag.parser.enum_values)}"
    return f"--{name} must be {allowed}, got {value!r}" if allowed else str(error).strip().splitlines()[0]


def own_flags() -> list[str]:
    """Returns the names of the program's flags."""
    return [flag.name for flag in flags.FLAGS.get_flags_for_module("cib_jax.cli.flags")]


def help_text(name: str) -> str:
    """Returns the help of a mode, or, for "", of the program."""
    program, mode = console.with_program_name("").partition(":")[0], MODES.get(name)
    lines = [f"{program} {name if mode else 'MODE'} [--config=NAME] [--config.FIELD=VALUE ...] [flags]", ""]
    if mode:
        lines += [f"{name} {mode.about}:", "", f"  {program} {name} {mode.example}", ""]
    else:
        lines += [f"  {other:12}{MODES[other].about}" for other in MODES]
        lines += ["", f"`{program} MODE --help` has an example of a mode, its flags and fields.", ""]
    for flag in ("config", *mode.flags) if mode else own_flags():
        text = f"--{flag}: {flags.FLAGS[flag].help.partition(chr(10))[0].rstrip(';')}"  # without absl's own addition
        text += f" Names: {', '.join(config_names())}." if flag == "config" else ""
        lines.append(f"  {text}")
    if mode and name in (*STARTING, "index"):
        lines += _field_lines(INDEX_CONFIG if name == "index" else DEFAULT_CONFIG)
    width = min(shutil.get_terminal_size().columns, 100)
    return "\n".join(_wrapped(line, width) if line.startswith("  --") else line for line in lines)


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False)


def _field_lines(experiment: str) -> list[str]:
    """Returns the fields of configs/default.py with their meanings, and their values in an experiment."""
    default, values = (
        flatten(runpy.run_path(str(CONFIGS / f"{one}.py"))["get_config"]()) for one in ("default", experiment)
    )
    lines, above = ["", "Fields:"], ""
    for line in (CONFIGS / "default.py").read_text(encoding="utf-8").splitlines():
        comment = re.fullmatch(r" {4}# (.*)", line)
        field = re.fullmatch(r" {4}c\.([\w.]+) = (.*?)(?:  # (.*))?", line)
        if field and "ConfigDict" not in field[2]:
            name, value = field[1], "…" if field[2] == "(" else field[2]
            if values[name] != default[name]:
                value = f'"{values[name]}"' if isinstance(values[name], str) else repr(values[name])
            lines.append(f"  --config.{name}={value}  {field[3] or above}".rstrip())
        above = f"{above} {comment[1]}".strip() if comment else ""
    return lines


def _with_mode(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with a mode that is their first word, as in `cib-jax search`, as the flag --mode."""
    program, *rest = arguments
    if not rest or rest[0].startswith("-"):
        return [program, *rest]
    if rest[0] not in MODES:
        hint = did_you_mean(rest[0], MODES)
        exit_with_error(f"{rest[0]!r} is neither a mode nor a flag; {hint}modes are {', '.join(MODES)}")
    return [program, f"--mode={rest[0]}", *rest[1:]]


def _mode_of(arguments: Sequence[str], default: str = "train") -> str:
    mode = default
    for argument, following in itertools.pairwise([*arguments, ""]):
        if match := re.fullmatch(r"--?mode(?:=(.*))?", argument):
            mode = following if match[1] is None else match[1]
    return mode


def _with_sheet_name(arguments: Sequence[str]) -> Iterator[str]:
    """Yields the arguments, where --show without a value gets the name of the mode as its file."""
    for argument, following in itertools.pairwise([*arguments, "--"]):
        unnamed = argument in ("--show", "-show") and following.startswith("-")
        yield f"--show={_mode_of(arguments)}.png" if unnamed else argument


def _split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the last value of --config, or None, and the other arguments."""
    given, others, rest = None, [], iter(arguments)
    for argument in rest:
        match = re.fullmatch(r"--?config(?:=(.*))?", argument)
        if not match:
            others.append(argument)
            continue
        given = match[1] if match[1] is not None else next(rest, None)
        if given is None:
            problem = "a value is missing; give an experiment, such as --config=cifar, or a file's path"
            exit_with_error(f"--config: {problem}")
    return given, others


def _validate_fields(path: str, arguments: Sequence[str]) -> None:
    """Ends the program if the config file cannot be read, or if a field is set that it does not have."""
    try:
        fields = flatten(runpy.run_path(path)["get_config"]())
    except Exception as error:  # anything may go wrong in a user's own Python file
        exit_with_error(f"--config: {path!r} must define get_config(), which failed ({type(error).__name__}: {error})")
    for argument in arguments[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if not match or (name := match[1]) in fields:
            continue
        if group := [field for field in fields if field.startswith(f"{name}.")]:
            exit_with_error(f"--config.{name}: this is a group of fields; set one of them, such as {group[0]}")
        inside = [field for field in fields if field.endswith("." + name)]
        hint = f"did you mean {' or '.join(inside)}? " if inside else did_you_mean(name, fields, most=3)
        here = pathlib.Path.cwd()
        folder = CONFIGS.relative_to(here) if CONFIGS.is_relative_to(here) else CONFIGS
        exit_with_error(f"--config.{name}: there is no such field; {hint}{folder}/default.py lists all of them")
