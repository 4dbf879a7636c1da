"""The notebooks: a small run of every cell, which is slow, the saved outputs, and the installation of cib_jax."""

import ast
import base64
import importlib.metadata
import importlib.util
import io
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable

import jax
import PIL.Image
import pytest
import tensorflow_datasets as tfds
import yaml

import cib_jax
from tests.data import miniature

nbformat = pytest.importorskip("nbformat", reason="install the extra test")
pytest.importorskip("nbclient", reason="install the extra test")
pytest.importorskip("ipykernel", reason="install the extra test")

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
BADGE = "https://colab.research.google.com/github/cib-jax/cib_jax/blob/main/notebooks/{}.ipynb"

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cifar_settings(folder: pathlib.Path) -> dict:
    """A miniature CIFAR-10 in the layout of the real one."""
    (folder / "tfds").mkdir()
    small = {"image_size": 32, "views": 2, "epochs": 2, "train_per_class": 10, "k": 50, "mapped": 60}
    return {"data_dir": str(miniature.prepare(folder / "tfds")), **small}


# Settings of a small run of each notebook, made with an empty folder.
SMALL: dict[str, Callable[[pathlib.Path], dict]] = {
    "cib_cifar_tpu": cifar_settings,
    "functional_api": lambda folder: {"steps": 3, "draws": 50},
    "your_photos": lambda folder: {"sample_photos": 20, "views": 2, "epochs": 1, "stop_page": True},
}
# Text that a small run must print.
EXPECTED = {"cib_cifar_tpu": "on 2 device(s)", "functional_api": "x: uint8 [1797, 8, 8, 3]"}


def script():
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook):
    data = [output.get("data", {}) for cell in code(notebook) for output in cell.outputs]
    return [value for one in data for kind, value in one.items() if kind in ("image/png", "image/jpeg")]


@every
def test_the_settings_of_a_small_run_are_parameters(path, tmp_path):
    """A setting of another name would have no effect."""
    assert path.stem in SMALL, f"{path.name} has no row in SMALL: the settings of a small run"
    parameters = next(cell.source for cell in read(path).cells if "parameters" in cell.metadata.get("tags", ()))
    for name in SMALL[path.stem](tmp_path):
        assert re.search(rf"^([\w, ]+, )?{name}\b[\w, ]*=", parameters, re.MULTILINE), name


@every
def test_what_a_notebook_takes_from_the_package_exists(path):
    lines = "\n".join(cell.source for cell in code(read(path))).splitlines()
    tree = ast.parse("\n".join(line for line in lines if not line.startswith("%")))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cib_jax"):
            for name in node.names:
                modules[name.asname or name.name] = pkgutil.resolve_name(f"{node.module}.{name.name}")
        elif isinstance(node, ast.Import):
            of_package = [name for name in node.names if name.name.startswith("cib_jax")]
            modules |= {name.asname: pkgutil.resolve_name(name.name) for name in of_package}
    assert modules["cib"] is cib_jax
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.slow
@every
def test_every_cell_runs(path, tmp_path, monkeypatch):
    """Runs in an empty folder, with cib_jax of this clone; the training on two devices."""
    if path.stem == "cib_cifar_tpu":
        monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    saved, small = read(path), SMALL[path.stem](tmp_path)
    (tmp_path / "here").mkdir()
    ran = script().execute(path, "\n".join(f"{name} = {small[name]!r}" for name in small), tmp_path / "here")
    assert [cell.source for cell in ran.cells] == [cell.source for cell in saved.cells]
    assert EXPECTED.get(path.stem, "") in printed(ran)
    assert len(pictures(ran)) == len(pictures(saved))


@every
def test_the_saved_copy_was_run_from_top_to_bottom(path):
    notebook = read(path)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", output


@every
def test_the_saved_copy_has_pictures_and_no_paths(path):
    notebook, text = read(path), path.read_text(encoding="utf-8")
    assert len(text) < 1.5e6
    for picture in pictures(notebook):
        assert min(PIL.Image.open(io.BytesIO(base64.b64decode(picture))).size) > 100
    assert pictures(notebook)
    assert '"iopub.' not in text and set(notebook.metadata) <= {"kernelspec", "language_info", "accelerator", "colab"}
    assert notebook.metadata.language_info == {"name": "python"}
    written = "".join(str(cell.get("outputs", "")) for cell in notebook.cells)
    assert not re.search(r"/(home|root|Users|tmp|work|mnt)/", re.sub(r"'image/\w+': '[^']*'", "", written))


@every
def test_it_opens_in_colab_and_gives_its_run_time(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert f"]({BADGE.format(path.stem)})" in first.source
    assert re.search(r"\bminutes?\b", first.source)
    for page in ("README.md", "docs/index.md"):
        assert BADGE.format(path.stem) in (ROOT / page).read_text(encoding="utf-8"), page


def test_there_is_one_address():
    """Compares the package, the citation, the pages, and all badges, links and installation commands."""
    assert REPOSITORY == "https://github.com/cib-jax/cib_jax"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == REPOSITORY
    assert re.findall(r"^repo_url: (.*)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE) == [REPOSITORY]
    owner = REPOSITORY.removeprefix("https://github.com/")
    for page in (*NOTEBOOKS, ROOT / "README.md", ROOT / "docs" / "index.md"):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"colab\.research\.google\.com/github/([\w-]+/[\w-]+)", text):
            assert link == owner, (page, link)
        for link in re.findall(r"github\.com/([\w-]+/cib_jax)\b", text):
            assert link == owner, (page, link)
    for path in NOTEBOOKS:
        assert f"git+{REPOSITORY}" in code(read(path))[0].source


def test_they_install_alike():
    """Allows a difference only in the first line of the first cell: the extras, and the run time."""
    cells = [code(read(path))[0].source for path in NOTEBOOKS]
    assert len({cell.partition("\n")[2] for cell in cells}) == 1
    extras = importlib.metadata.metadata("cib-jax").get_all("Provides-Extra")
    for cell in cells:
        first = re.fullmatch(
            r'EXTRAS, PACKAGES, CPU_MINUTES = "(?:\[([\w,]+)\])?", \[.*\], \d+  # .*', cell.partition("\n")[0]
        )
        assert first and set((first[1] or "").split(",")) <= {"", *extras}


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Returns a function that runs a first cell without an installed cib_jax, and returns the packages given to pip."""
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    (tmp_path / "somewhere").mkdir()
    monkeypatch.chdir(tmp_path / "somewhere")

    def run(pip=(0, ""), path=NOTEBOOKS[0]):
        asked.clear()

        def started(command, **_):
            asked.append(command)
            return types.SimpleNamespace(returncode=pip[0], stderr=pip[1])

        monkeypatch.setattr(subprocess, "run", started)
        exec(code(read(path))[0].source, {})
        (command,) = asked
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        return command[-2:]

    return run


def test_it_installs_from_github_where_there_is_no_clone(install, capsys):
    assert install() == ["jax", f"cib-jax @ git+{REPOSITORY}"]
    asked, device = capsys.readouterr().out.splitlines()
    assert asked == f"pip install 'jax' 'cib-jax @ git+{REPOSITORY}'"
    assert device.startswith(f"CPU, {os.cpu_count()} cores: on two, this notebook takes about ")


def test_it_installs_from_the_clone_that_contains_it(install, monkeypatch):
    monkeypatch.chdir(FOLDER)
    assert install() == ["jax", f"cib-jax @ {ROOT.as_uri()}"]


def test_it_installs_the_extras_that_are_missing(install, monkeypatch):
    """As in a clone whose requirements.txt alone is installed."""
    there = types.SimpleNamespace(origin="there")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there if name == "cib_jax" else None)
    path = FOLDER / "your_photos.ipynb"
    assert install(path=path)[1] == f"cib-jax[search,web] @ git+{REPOSITORY}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    with pytest.raises(ValueError, match="not enough values"):  # pip is not called
        install(path=path)


def test_a_tpu_gets_jax_for_tpus(install, monkeypatch):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-1")
    assert install()[0] == "jax[tpu]"


def test_an_nvidia_gpu_gets_jax_for_cuda(install, monkeypatch):
    monkeypatch.setattr("glob.glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    assert install()[0] == "jax[cuda12]"
    # A second version beside the one that the runtime has would not load.
    here = types.SimpleNamespace(origin="there")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: here if name == "jax_cuda13_plugin" else None)
    assert install()[0] == "jax[cuda13]"


def test_a_failed_installation_is_one_sentence(install):
    with pytest.raises(SystemExit, match=r"git\+https.* \(fatal: no such host\)"):
        install((1, "error: subprocess-exited-with-error\nfatal: no such host\nnote: and so on"))


def test_an_old_loaded_library_needs_a_restart(install, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99" if name == "pillow" else sys_version(name))
    with pytest.raises(SystemExit, match="older PIL"):
        install()


def sys_version(name):
    return sys.modules[name].__version__


def test_devices_are_named(monkeypatch, capsys):
    v5e = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    monkeypatch.setattr(jax, "devices", lambda: [v5e] * 8)
    exec(code(read(NOTEBOOKS[0]))[0].source, {})
    assert capsys.readouterr().out == "8 × TPU v5 lite\n"


def test_missing_data_are_one_sentence(tmp_path, monkeypatch):
    """Tests a missing folder, and a download without a network."""
    cells = code(read(FOLDER / "cib_cifar_tpu.ipynb"))
    loading = next(cell.source for cell in cells if "sources.load" in cell.source)
    imports = next(cell.source for cell in cells if "IPython.display" in cell.source)
    names: dict = {"train_per_class": 10, "backbone": "efficientnet_lite0"}
    exec("\n".join(line for line in imports.splitlines() if not line.startswith("%")), names)
    with pytest.raises(SystemExit, match="/nope"):
        exec(loading, names | {"data_dir": str(tmp_path / "nope")})

    def unreachable(manager, url):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", unreachable)
    with pytest.raises(SystemExit, match="ConnectionError: no route to host"):
        exec(loading, names | {"data_dir": str(tmp_path)})
