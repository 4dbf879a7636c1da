"""An unsuitable Python is reported in one sentence, in syntax that it can parse."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from cib_jax.cli import python_check

ROOT = pathlib.Path(__file__).parents[2]


def test_the_oldest_is_the_one_that_pip_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={'.'.join(map(str, python_check.OLDEST))}"


@pytest.mark.parametrize(("python", "wanted"), [("3.10", True), ("3.11", False), ("3.13", False)])
def test_pip_of_an_older_one_fails_at_a_line_that_says_why(python, wanted):
    """`pip install -r requirements.txt` fell over the first package that dropped it, and named that alone."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    first = Requirement(next(line for line in lines if line and not line.startswith("#")))
    assert first.extras == {f"cib-jax-needs-Python-{'.'.join(map(str, python_check.OLDEST))}-or-newer"}
    assert first.marker.evaluate({"python_version": python}) is wanted


def test_an_older_one_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        python_check.check_python(oldest=(99, 1))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("run.py: Python 99.1 ") and len(error.splitlines()) == 1
    assert f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro};" in error


@pytest.mark.parametrize(
    "name", ["run.py", "cib_jax/__init__.py", "cib_jax/__main__.py", "cib_jax/cli/__init__.py", "cib_jax/hint.py"]
)
def test_what_is_read_before_the_check_is_in_the_words_of_old_ones(name):
    for file in (ROOT / name, pathlib.Path(python_check.__file__)):
        ast.parse(file.read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("door", [["-m", "cib_jax"], ["run.py"]])
def test_without_its_packages_it_says_where_they_are_missing(door):
    """As of a Python beside the environment; -S leaves out what is installed."""
    done = subprocess.run([sys.executable, "-S", *door], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"are not installed for {sys.executable}; " in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_told_to_end_while_it_loads_it_says_so_without_a_traceback(name, code):
    kill = (
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from cib_jax.cli import python_check; python_check.handle_early_signals(); "
        f"os.kill(os.getpid(), signal.{name}); import time; time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", kill], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stdout == ""
    assert "before anything began; the same command starts again." in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
