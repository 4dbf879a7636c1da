"""The README's own words: its training loop runs, learns, and is short; its commands are two."""

import ast
import pathlib
import re
import shutil
import subprocess

import PIL.Image
import pytest
import sklearn.datasets

import cib_jax as cib

pytestmark = pytest.mark.usefixtures("compiled_as_for_users")  # it trains for half a minute

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_loop_runs_as_it_stands(capsys):
    text = re.search(r"<!-- loop -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len(text.strip().splitlines()) < 20
    exec(compile(text, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) > 0.5  # random codes: 0.1


def test_the_baseline_runs_as_it_stands(capsys):
    text = re.search(r"<!-- baseline -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(text, "README.md", "exec"), {})
    said = float(re.search(r"this prints about ([\d.]+)", README).group(1))
    assert abs(float(capsys.readouterr().out) - said) < 0.03


def test_five_lines_search_a_folder(tmp_path, monkeypatch, capsys):
    digits = sklearn.datasets.load_digits()
    images = (digits.images[:120, ..., None] * 15.9).astype("uint8").repeat(3, axis=-1)
    cib.fit(images, bits=16, image_size=16, augment="digits", epochs=1, hidden=32).save(tmp_path / "runs" / "photos")
    (tmp_path / "PHOTOS").mkdir()
    for number, image in enumerate(images):
        PIL.Image.fromarray(image).save(tmp_path / "PHOTOS" / f"{number:03}.png")
    shutil.copy(tmp_path / "PHOTOS" / "007.png", tmp_path / "photo.jpg")
    text = re.search(r"<!-- search -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len(text.strip().splitlines()) == 7  # five, an import and a space
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "README.md", "exec"), found := {})
    printed = ast.literal_eval(capsys.readouterr().out)
    assert printed == [found["paths"][number] for number in found["ids"][0]]
    # The photo itself is as near as can be, unless others with its code come before it.
    codes = found["codes"]
    same = [str(tmp_path / "PHOTOS" / f"{number:03}.png") for number in range(120) if (codes[number] == codes[7]).all()]
    assert printed[: len(same)] == same[: len(printed)]


def test_a_fresh_machine_needs_one_command_each_to_run_and_to_test():
    opening = README.split("## The main job")[0]
    commands = re.findall(r"^python3 .*$", opening, re.MULTILINE)
    assert len(commands) == 2
    assert "run.py" in commands[0]
    assert "pytest" in commands[1]


def test_ci_runs_the_readmes_test_command():
    """By the very line of .ci/run that takes it out of the README."""
    root = pathlib.Path(__file__).parents[2]
    taking = next(line for line in (root / ".ci" / "run").read_text().splitlines() if line.startswith("test_command="))
    taken = subprocess.check_output(["bash", "-c", f'{taking}; echo "$test_command"'], cwd=root, text=True)
    assert taken.strip() == re.findall(r"^python3 .*$", README, re.MULTILINE)[1]
