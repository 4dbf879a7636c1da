"""The entry point: flags belong to modes, and become the keyword arguments of commands."""

import importlib
import inspect
import pathlib
import sys

import jax
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
        (["--mode=search", "--index=i", "--query=/nowhere.jpg"], "--query"),
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
    assert arguments == {"workdir": pathlib.Path("w"), "codes": None, "overrides": overrides}


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (MemoryError("Unable to allocate 1. GiB"), "Unable to allocate 1. GiB"),
        (RuntimeError("can't start new thread"), "memory"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "allocating 9 bytes"),
        (ImportError("libx.so: failed to map segment from shared object", name="libx"), "failed to map segment"),
    ],
)
def test_a_lack_of_memory_and_a_damaged_library_are_one_sentence(refusal, monkeypatch, error, part):
    def search(**_):
        raise error

    monkeypatch.setattr(importlib.import_module("cib_jax.commands.search"), "search", search)
    assert part in refusal("--mode=search", "--index=i", "--query=README.md")


def test_other_errors_keep_their_traceback(run_cli, monkeypatch):
    for error in (RuntimeError("unexpected"), ImportError("no x", name="cib_jax.x")):

        def search(error=error, **_):
            raise error

        monkeypatch.setattr(importlib.import_module("cib_jax.commands.search"), "search", search)
        with pytest.raises(type(error)) as raised:
            run_cli("--mode=search", "--index=i", "--query=README.md")
        assert raised.value is error


@pytest.mark.parametrize("usable", [True, False])
def test_without_a_folder_for_compiled_programs_one_sentence_is_printed(tmp_path, monkeypatch, capsys, usable):
    before = jax.config.values["jax_compilation_cache_dir"]
    home = tmp_path / "home"
    if not usable:
        home.write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        main.use_compilation_cache()
        folder = str(home / "cib_jax" / "compiled")
        assert jax.config.values["jax_compilation_cache_dir"] == (folder if usable else None)
        error = capsys.readouterr().err
        assert (error.count("\n"), folder in error) == ((0, False) if usable else (1, True))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
