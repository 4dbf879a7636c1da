"""Evaluation of a trained run: under other fields, into other files, and what is refused."""

import json
import os

import numpy as np
import pytest
import rich.console

import cib_jax as cib
from cib_jax.commands.evaluate import evaluate, order_warning, override_fields
from cib_jax.commands.train import train
from cib_jax.errors import CheckpointError, ConfigError, DataError
from tests.commands import many
from tests.retrieval import reference
from tests.small import codes_of, reference_map

QUIET = rich.console.Console(quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    return folder / "run", train(many.config(folder, bits=20, nested=True), folder / "run", console=QUIET)


def test_a_run_is_evaluated_to_the_same_results(run):
    workdir, results = run
    again = evaluate(workdir, console=QUIET)
    assert (again["map"], again["metrics"]) == (results["map"], results["metrics"])
    assert json.loads((workdir / "results.json").read_text())["map"] == results["map"]


def test_a_nested_run_is_evaluated_at_each_length(run):
    workdir, results = run
    codes = codes_of(workdir)
    for side in ("query", "database"):
        codes[f"{side}_codes"] = codes[f"{side}_codes"][:, :2]  # bytes of 16 bits
    names = ("query_codes", "database_codes", "query_labels", "database_labels")
    expected = reference.reference_map([codes[name] for name in names], results["k"])
    assert results["metrics"]["map_of_first_bits"] == pytest.approx({"16": expected, "20": results["map"]})


@pytest.mark.parametrize("packed", [True, False])
def test_codes_of_any_model_are_evaluated(run, tmp_path, run_cli, packed):
    """Compares with the run that computed them; a file without labels is refused."""
    workdir, results = run
    arrays = {path.stem: np.load(path) for path in (workdir / "codes").glob("*.npy")}
    if not packed:
        arrays |= {name: cib.unpack_bits(arrays[name], results["bits"]) for name in ("query_codes", "database_codes")}
    np.savez(tmp_path / "codes.npz", **arrays)
    ended = run_cli("--mode=evaluate", f"--codes={tmp_path}/codes.npz", f"--config.k={results['k']}")
    assert ended.code == 0 and f"{results['map']:.4f}" in ended.out, ended
    found = evaluate(None, codes=tmp_path / "codes.npz", overrides={"k": results["k"]}, console=QUIET)
    assert (found["map"], found["map_tie_aware"]) == (results["map"], results["map_tie_aware"])
    with pytest.raises(ConfigError, match=r"^config\.bits\b"):
        evaluate(None, codes=tmp_path / "codes.npz", overrides={"bits": 8, "k": 5}, console=QUIET)
    np.savez(tmp_path / "half.npz", query_codes=arrays["query_codes"])
    with pytest.raises(DataError) as error:
        evaluate(None, codes=tmp_path / "half.npz", console=QUIET)
    assert error.value.field == "--codes"


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "empty", "text", "cut", "other bytes"])
def test_a_file_of_codes_that_cannot_be_read_is_refused(tmp_path, kind):
    path = tmp_path / "codes.npz"
    np.savez_compressed(path, query_codes=np.zeros((4, 1), np.uint8), database_codes=np.zeros((999, 1), np.uint8))
    whole = path.read_bytes()
    path.unlink()
    contents = {
        "empty": b"",
        "text": b"no codes",
        "cut": whole[:-40],
        "other bytes": whole[:60] + b"?" * 20 + whole[80:],
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in contents:
        path.write_bytes(contents[kind])
    with pytest.raises(DataError) as error:
        evaluate(None, codes=path, console=QUIET)
    assert error.value.field == "--codes" and str(path) in str(error.value)


def test_results_under_another_k_are_written_beside_those_of_the_run(run):
    workdir, results = run
    console = rich.console.Console(record=True, width=100)
    other = evaluate(workdir, overrides={"k": 10}, console=console)
    assert other["map"] == pytest.approx(reference_map(workdir, 10), rel=1e-12)
    assert "MAP@10" in console.export_text()
    assert json.loads((workdir / "results-epoch2-k10.json").read_text())["map"] == other["map"]
    assert json.loads((workdir / "results.json").read_text())["map"] == results["map"]


def test_a_database_sorted_by_class_is_warned_of():
    """All codes are equal, so that the order of the database alone decides the ranking."""
    codes, sorted_labels = np.zeros((1000, 1), np.uint8), np.repeat([0, 1], 500)
    for labels, warned in ((sorted_labels, True), (np.random.default_rng(0).permutation(sorted_labels), False)):
        data = codes[:2], codes, np.array([0, 1]), labels
        found, expected = cib.mean_average_precision(*data, k=1000), cib.tie_aware_map(*data, k=1000)
        assert bool(order_warning(found, expected)) is warned
    assert order_warning(None, None) == ""


def test_fields_that_change_the_run_are_refused_and_equal_ones_are_not(run, tmp_path):
    config = many.config(tmp_path)
    assert override_fields(config, {"bits": config.bits, "encode_batch": 3}).encode_batch == 3
    with pytest.raises(ConfigError) as error:
        evaluate(run[0], overrides={"bits": 32}, console=QUIET)
    assert error.value.field == "config.bits"
    with pytest.raises(CheckpointError):
        evaluate(tmp_path / "nothing", console=QUIET)
