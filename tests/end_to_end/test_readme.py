"""The Python examples of README.md and docs/library.md run, and the README's two set-up commands are what CI runs."""

import ast
import pathlib
import re
import shutil
import subprocess

import jax
import PIL.Image
import pytest
import sklearn.datasets

import cib_jax as cib
from tests.commands import indexing

pytestmark = pytest.mark.usefixtures("compiled_to_run")

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")


def example(page: str, marker: str) -> str:
    """Returns the Python code that follows `<!-- marker -->` on a page."""
    return re.search(rf"<!-- {marker} -->\n```python\n(.*?)```", page, re.DOTALL).group(1)


EXAMPLES = {
    # The page, the words that say how long it trains, and those of a training that takes a fraction of the time.
    "example": (README, "epochs=5", "epochs=2"),
    "loop": (LIBRARY, "range(120)", "range(30)"),
}


@pytest.mark.parametrize("marker", EXAMPLES)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "whole"])
def test_training_example_learns(marker, whole, capsys):
    page, length, shorter = EXAMPLES[marker]
    text = example(page, marker)
    assert len(text.strip().splitlines()) < 20 and text.count(length) == 1
    exec(compile(text if whole else text.replace(length, shorter), marker, "exec"), {})
    assert float(capsys.readouterr().out) > (0.5 if whole else 0.3)  # random codes: 0.1


def test_baseline_example_prints_the_stated_map(capsys):
    exec(compile(example(LIBRARY, "baseline"), "baseline", "exec"), {})
    stated = float(re.search(r"gives a MAP of\s+about ([\d.]+)", LIBRARY).group(1))
    assert abs(float(capsys.readouterr().out) - stated) < 0.05


def test_search_example_finds_the_query_itself(tmp_path, monkeypatch, capsys):
    digits = sklearn.datasets.load_digits()
    images = (digits.images[:120, ..., None] * 15.9).astype("uint8").repeat(3, axis=-1)
    indexing.save_hasher(tmp_path / "runs" / "photos", bits=16)
    (tmp_path / "PHOTOS").mkdir()
    for number, image in enumerate(images):
        PIL.Image.fromarray(image).save(tmp_path / "PHOTOS" / f"{number:03}.png")
    shutil.copy(tmp_path / "PHOTOS" / "007.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(example(LIBRARY, "search"), "search", "exec"), found := {})
    printed = ast.literal_eval(capsys.readouterr().out)
    assert printed == [found["paths"][number] for number in found["ids"][0]]
    # The photo has distance 0, so only photos with the same code may come before it.
    codes = found["codes"]
    same = [str(tmp_path / "PHOTOS" / f"{number:03}.png") for number in range(120) if (codes[number] == codes[7]).all()]
    assert printed[: len(same)] == same[: len(printed)]


def test_photos_are_indexed_and_searched_by_the_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    """The index has an encoder already, so that none is trained with the default experiment."""
    made = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=64, image_size=16)
    cib.Hasher(*made).save(tmp_path / "RUN")
    (tmp_path / "PHOTOS").mkdir()
    PIL.Image.linear_gradient("L").save(tmp_path / "PHOTOS" / "copy.png")
    for color in ("red", "green", "blue"):
        PIL.Image.new("RGB", (40, 30), color).save(tmp_path / "PHOTOS" / f"{color}.png")
    PIL.Image.linear_gradient("L").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    cib.index_photos("INDEX", "PHOTOS", workdir="RUN")
    shutil.copy("photo.jpg", "PHOTOS/late.jpg")
    exec(compile(example(README, "search"), "search", "exec"), found := {})
    printed = capsys.readouterr().out.splitlines()
    assert "0 late.jpg" in printed and len(found["photos"]) == 5
    assert [{photo.path for _, photo in group} for group in found["photos"].duplicates()] == [{"copy.png", "late.jpg"}]
    with pytest.raises(cib.UserError) as refused:
        found["photos"].search("PHOTOS")
    assert refused.value.field == "photo"


def test_readme_is_short():
    assert len(README.splitlines()) < 140
    assert len(README.split()) < 800


def test_setting_up_takes_one_command_to_run_and_one_to_test():
    commands = re.findall(r"^python3 .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert "run.py" in commands[0]
    assert "pytest" in commands[1]


def test_ci_runs_the_test_command_of_the_readme():
    """Executes the line of .ci/run that extracts the command."""
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    extract = next(line.strip() for line in script if line.strip().startswith("test_command="))
    command = subprocess.check_output(["bash", "-c", f'{extract}; echo "$test_command"'], cwd=ROOT, text=True)
    assert command.strip() == re.findall(r"^python3 .*$", README, re.MULTILINE)[1]


def test_links_of_the_readme_exist():
    for path in re.findall(r"\]\((?!https?:|#)([^)#\s]+)\)", README):
        assert (ROOT / path).exists(), path
