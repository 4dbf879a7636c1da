"""A Python that cannot run the program is told so in one sentence, by whatever Python it is."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

from cib_jax.command import interpreter

ROOT = pathlib.Path(__file__).parents[2]


def test_the_oldest_is_the_one_that_pip_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={'.'.join(map(str, interpreter.OLDEST))}"


def test_an_older_one_is_named(monkeypatch, capsys):
    monkeypatch.setattr(interpreter, "OLDEST", (99, 1))
    with pytest.raises(SystemExit) as ended:
        interpreter.check()
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith("run.py: Python 99.1 or newer is needed, and ") and len(told.splitlines()) == 1
    assert f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro};" in told


@pytest.mark.parametrize("name", ["run.py", "cib_jax/__init__.py", "cib_jax/__main__.py", "cib_jax/program.py"])
def test_what_is_read_before_the_check_is_in_the_words_of_old_ones(name):
    for file in (ROOT / name, pathlib.Path(interpreter.__file__)):
        ast.parse(file.read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("door", [["-m", "cib_jax"], ["run.py"]])
def test_without_its_packages_it_says_where_they_are_missing(door):
    """As of a Python beside the environment; -S leaves out what is installed."""
    done = subprocess.run([sys.executable, "-S", *door], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"are not installed for {sys.executable}; " in done.stderr and len(done.stderr.splitlines()) == 1
