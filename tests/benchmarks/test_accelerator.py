"""The measurement of accelerators, in small, on a CPU."""

import json

import pytest

from benchmarks import accelerator
from tests.retrieval import reference


def test_everything_is_measured_and_written(tmp_path, capsys):
    """On a CPU, whose results are its own."""
    small = ["--batch", "8", "--queries", "10", "--codes", "5000", "--seconds", "0"]
    accelerator.main(["convnet", *small, "--json", str(tmp_path / "figures.json")])
    content = json.loads((tmp_path / "figures.json").read_text())
    assert [float(row[-1].rstrip("%")) for row in content["parity"]] == pytest.approx([0.0] * 9)
    assert content["programs"].keys() == {"convnet"}
    figures = content["programs"]["convnet"]
    assert figures["images_per_second"] * figures["seconds_of_a_call"] == pytest.approx(figures["images"])
    assert figures["flops"] > 0 and figures["seconds_of_a_call"] > 0
    assert content["rank"]["seconds"] > 0
    assert "unknown chip" in capsys.readouterr().out


def test_the_map_to_compare_with_is_that_of_the_definition():
    queries, codes, asked, labels = data = reference.random_data()
    assert accelerator.brute_force_map(queries, codes, asked, labels, 20) == pytest.approx(
        reference.reference_map(data, 20)
    )
