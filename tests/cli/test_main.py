"""The entry point: flags belong to modes, and become the keyword arguments of commands."""

import importlib
import inspect
import pathlib
import sys

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from cib_jax.cli import flags, main, parsing


@pytest.fixture
def parse(monkeypatch):
    def parsed(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        return parsing.parse(sys.argv)

    with flagsaver.flagsaver():
        yield parsed


@pytest.mark.parametrize("name", flags.MODES)
def test_a_command_takes_the_flags_of_its_mode(parse, name):
    parse(f"--mode={name}")
    module, function = flags.MODES[name].command.split(".")
    command = getattr(importlib.import_module(f"cib_jax.commands.{module}"), function)
    inspect.signature(command).bind(**main.command_arguments(name, pathlib.Path("run"), False))


def test_every_flag_belongs_to_a_mode():
    own = {flag.name for flag in absl_flags.FLAGS.get_flags_for_module("cib_jax.cli.flags")} - {"mode", "config"}
    assert own == {flag for mode in flags.MODES.values() for flag in mode.flags}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--mode=search", "--query=x"], "--index"),
        (["--mode=search", "--index=i"], "--query"),
        (["--mode=encode", "--codes=c"], "--workdir"),
        (["--mode=encode", "--workdir=w"], "--codes"),
        (["--mode=evaluate"], "--workdir"),
        (["--mode=duplicates", "--index="], "--index"),
        (["--k=3"], "--k"),
        (["--workdir="], "--workdir"),
        (["--mode=serve", "--index=i", "--config.bits=8"], "--config"),
        (["--mode=index", "--index=i", "--workdir=w", "--config=cifar"], "--config"),
    ],
)
def test_a_flag_that_is_missing_or_in_vain_ends_the_program(parse, capsys, arguments, field):
    rest = parse(*arguments)
    with pytest.raises(SystemExit) as ended:
        main.main(rest)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"run.py: {field}: ") and len(error.splitlines()) == 1


def test_fields_become_overrides_and_an_experiment_must_agree_with_the_run(parse):
    given = parse("--mode=evaluate", "--workdir=w", "--config=cifar", "--config.k=5")
    arguments = main.command_arguments("evaluate", pathlib.Path("w"), len(given) > 1)
    overrides = {"data.name": "cifar10", "backbone": "efficientnet_lite0", "k": 5}
    assert arguments == {"workdir": pathlib.Path("w"), "overrides": overrides}
