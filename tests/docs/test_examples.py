"""Every public name has an example in its docstring, which runs and gives the documented output."""

import doctest
import subprocess
import sys

import jax
import PIL.Image
import pytest
import rich.console

import cib_jax as cib
from cib_jax.storage import code_store
from configs import digits
from configs import index as index_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folders that the examples use: photos, an encoder, codes of the photos, an index, a trained run."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "PHOTOS").mkdir()
    for color in ("blue", "green", "red"):
        PIL.Image.new("RGB", (40, 30), color).save(folder / "PHOTOS" / f"{color}.png")
    made = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
    cib.Hasher(*made).save(folder / "RUN")
    _, codes, _ = cib.encode_photos(cib.Hasher.load(folder / "RUN"), folder / "PHOTOS")
    paths = ["blue.png", "green.png", "red.png"]  # relative to the folder, as --mode=encode stores them
    held = code_store.begin(folder / "CODES", {"bits": 16}, 3, paths, str(folder / "PHOTOS"), keep_list=True)
    files = [code_store.File(path, 1, 0, "") for path in paths]
    code_store.write_part(held.path(0), held.identity, files, codes, {})
    cib.index_photos(
        str(folder / "INDEX"),
        str(folder / "PHOTOS"),
        workdir=folder / "RUN",
        config=index_config.get_config(),
        console=rich.console.Console(quiet=True),
    )
    config = digits.get_config()
    # As in the example of `train`, which finds its run finished; its program is also that of tests/small.py.
    config.update_from_flattened_dict({"epochs": 1, "bits": 16, "image_size": 8, "hidden": 32, "batch_size": 32})
    config.update_from_flattened_dict({"data.train_per_class": 13, "cache.dir": "none", "report.write": False})
    cib.train(config, folder / "DIGITS", console=rich.console.Console(quiet=True))
    return folder


@pytest.mark.parametrize("name", cib.__all__)
def test_examples(name, folder, monkeypatch, own_parts):
    monkeypatch.chdir(folder)
    found = doctest.DocTestFinder().find(getattr(cib, name), name, globs={})
    assert found[0].examples, f"{name} has no example"
    runner, output = doctest.DocTestRunner(), []
    for test in found:
        runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)


@pytest.mark.slow
def test_a_type_checker_accepts_the_examples(tmp_path):
    """Runs pyright, if it is installed."""
    pytest.importorskip("pyright")
    for name in cib.__all__:
        tests = doctest.DocTestFinder().find(getattr(cib, name), name, globs={})
        source = "".join(example.source for test in tests for example in test.examples)
        (tmp_path / f"{name}.py").write_text(source)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(tmp_path)]
    printed = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    assert "0 errors" in printed or "error:" in printed, printed
    # Of an installation for development, pyright does not find cib_jax.configs in configs/.
    errors = [line for line in printed.splitlines() if "error:" in line and "unknown import symbol" not in line]
    assert errors == []
