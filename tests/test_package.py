"""What is installed: a wheel with all it needs and nothing else, which runs without a clone, and what it declares."""

import ast
import contextlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cib_jax
from cib_jax.training import metric_writers

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BESIDES_PYTHON = {
    "cib_jax/py.typed",
    "cib_jax/report/page.html.jinja",
    *(f"cib_jax/web/{name}" for name in ("api.js", "code_glyph.js", "page.css", "page.html", "page.js")),
}
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def built(what, source, place):
    """Builds a wheel or a source archive, as pip does, and returns its path."""
    command = [sys.executable, "-c", BUILD, what, str(place)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is absent from the `packages` configuration" not in done.stderr
    return place / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the clone, since setuptools writes into the folder of its sources."""
    pytest.importorskip("setuptools", minversion="77")
    place = tmp_path_factory.mktemp("clone") / "clone"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "golden")
    outputs = shutil.ignore_patterns("build", "dist", "runs")  # only at the root: the package has a folder runs, too

    def ignore(folder, names):
        return unwanted(folder, names) | (outputs(folder, names) if pathlib.Path(folder) == ROOT else set())

    shutil.copytree(ROOT, place, ignore=ignore)
    return place


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return built("build_wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a command in an empty folder, with the files of the wheel instead of the clone."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    empty = tmp_path_factory.mktemp("empty")

    def start(*arguments):
        environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "120"}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return start


def test_a_wheel_holds_the_package_and_the_experiments_and_nothing_else(wheel):
    package = {file.relative_to(ROOT).as_posix() for file in (ROOT / "cib_jax").rglob("*.py")}
    configs = {f"cib_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("cib_jax/configs/__init__.py") == (ROOT / "configs" / "__init__.py").read_bytes()
    about = {name for name in names if name.startswith(f"cib_jax-{cib_jax.__version__}.dist-info/")}
    assert names - about == package | configs | BESIDES_PYTHON
    assert any(name.endswith("LICENSE") for name in about)


def test_the_list_of_other_files_is_whole():
    others = {file for file in (ROOT / "cib_jax").rglob("*.*") if file.suffix not in (".py", ".pyc")}
    assert {file.relative_to(ROOT).as_posix() for file in others} == BESIDES_PYTHON


def test_a_wheel_from_the_source_archive_is_the_same(source, wheel, tmp_path):
    archive = built("build_sdist", source, tmp_path)
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert {"run.py", "configs", "LICENSE"} <= {file.name for file in unpacked.iterdir()}
    again = built("build_wheel", unpacked, tmp_path)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        for name in one.namelist():
            assert name.endswith("RECORD") or one.read(name) == other.read(name)


def test_an_installed_one_runs_without_a_clone(installed):
    code, out, error = installed("-c", "import cib_jax.configs.text as t; print(t.get_config().data.name, t.__file__)")
    assert code == 0 and out.startswith("features ") and str(ROOT) not in out, error
    code, _, error = installed("-m", "cib_jax", "--config=cifar", "--config.data.dir=/nope")
    assert code == 2 and error.startswith("python -m cib_jax: config.data.dir: ") and "/nope" in error
    code, _, error = installed("-m", "cib_jax", "--config=configs/cifar.py")
    assert code == 2 and error.startswith("python -m cib_jax: --config: ") and "configs/cifar.py" in error
    code, _, error = installed("-m", "cib_jax", "--config.data.queries=-5")  # the digits are the default data set
    assert code == 2 and error.startswith("python -m cib_jax: config.data.queries must "), error


@pytest.mark.parametrize("program", [["-m", "cib_jax"], ["run.py"]])
def test_help_lists_the_flags(program):
    done = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"{'python -m cib_jax' if '-m' in program else 'run.py'} MODE ")
    for flag in ("--config:", "--mode:", "--workdir:", "--index:", "--port:"):
        assert f"  {flag} " in done.stdout
    assert "--logtostderr" not in done.stdout  # one of absl's flags, which --helpfull lists


def test_help_may_be_read_in_part():
    """As by `head`, which closes the pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "run.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_starts_the_program_and_is_named_in_its_help(tmp_path):
    module, function = PROJECT["scripts"]["cib-jax"].split(":")
    script = tmp_path / "cib-jax"  # as pip writes it
    script.write_text(f"from {module} import {function}\n{function}()\n")
    command, environment = [sys.executable, script, "search", "--help"], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("cib-jax search ") and "\n  cib-jax search --index=" in done.stdout, done.stderr


def test_whatever_is_imported_is_declared():
    """Looks up in the installed packages which of them provides each imported module."""
    known = {canonicalize_name(one.name) for one in declared()}
    owners = importlib.metadata.packages_distributions()
    for file in (ROOT / "cib_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "cib_jax"}:
                homes = {canonicalize_name(owner) for owner in owners.get(name, [name])}
                assert homes & known, (file, name)


def declared() -> list[Requirement]:
    """Every requirement of this Python, of a run and of the extras; the project's own extras aside."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    lines += [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    every = [one for one in map(Requirement, filter(None, lines)) if one.marker is None or one.marker.evaluate()]
    return [one for one in every if one.name != PROJECT["name"]]


def test_every_requirement_has_a_lower_bound_that_what_is_installed_keeps():
    wanted = declared()
    assert [str(one) for one in wanted if {part.operator for part in one.specifier} not in ({">="}, {"=="})] == []
    for one in wanted:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of an extra
            assert one.specifier.contains(importlib.metadata.version(one.name), prereleases=True), one


def test_a_bound_stands_the_same_wherever_it_stands():
    bounds: dict[str, set[str]] = {}
    for one in declared():
        bounds.setdefault(canonicalize_name(one.name), set()).add(str(one.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def test_every_extra_that_is_spoken_of_is_there():
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "cib_jax").rglob("*.py")]
    told = {extra for file in texts for extra in re.findall(r"cib-jax\[([\w,]+)\]", file.read_text())}
    assert {one for extra in told for one in extra.split(",")} <= {*PROJECT["optional-dependencies"]}
    assert set(metric_writers.EXTRAS) <= {*PROJECT["optional-dependencies"]}
    table = (ROOT / "docs" / "installation.md").read_text().split("\n## Extras\n")[1]
    assert {*re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)} == {*PROJECT["optional-dependencies"]}


def test_the_citation_is_of_this_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == cib_jax.__version__ and cited["license"] == PROJECT["license"]
    assert cited["preferred-citation"]["url"].endswith("/2105.06138")
    assert cited["preferred-citation"]["year"] == 2021
