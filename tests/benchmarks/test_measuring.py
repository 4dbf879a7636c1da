"""Timing in turns, ratios and tables; and that each script prints its flags or the packages that are missing."""

import importlib
import importlib.util
import pathlib
import re
import sys

import pytest

from benchmarks import growth, measuring
from benchmarks.measuring import Seconds

ROOT = pathlib.Path(measuring.__file__).parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main()" in path.read_text())


def test_sides_are_run_in_turns_and_the_warm_up_does_not_count():
    calls = []
    taken = measuring.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm_up=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(seconds.rounds) for name, seconds in taken.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_taken_round_by_round():
    slow, fast = Seconds((2.0, 9.0, 4.0)), Seconds((1.0, 3.0, 4.0))
    assert measuring.ratio(slow, fast) == (1.0, 2.0, 3.0)
    assert measuring.format_ratio(slow, fast) == "2.00 (1.00–3.00)"
    assert slow.median == 4.0


def test_deviations_are_those_of_a_sample():
    assert measuring.mean_and_deviation([0.5, 0.6, 0.7]) == "0.600 ± 0.100"
    assert measuring.mean_and_deviation([0.5, 0.6], digits=1) == "0.6 ± 0.1"
    assert measuring.mean_and_deviation([0.12345], digits=4) == "0.1235"


def test_a_table_is_markdown(capsys):
    measuring.print_table(["px", "views/s"], [[128, "2,000"], [224, 1]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["| px  | views/s |", "| --- | ------- |", "| 128 | 2,000   |", "| 224 | 1       |"]


def test_the_exponent_of_a_power_is_the_power():
    assert growth.exponent([1, 10, 100], [3.0, 300.0, 30000.0]) == pytest.approx(2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_its_flags_or_the_missing_packages(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{script}").main()
    out, error = capsys.readouterr()
    if ended.value.code:
        assert ended.value.code == 2
        (line,) = error.splitlines()
        missing = re.fullmatch(r"this benchmark needs (.+): pip install -e '\.\[benchmark\]'", line)[1].split(", ")
        assert all(importlib.util.find_spec(module) is None for module in missing)
    else:
        assert "usage:" in out
