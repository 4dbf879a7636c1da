"""Checkpoints outside the workdir: trained, resumed, evaluated and loaded from there, by one run at a time."""

import json
import math
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
import rich.console

import cib_jax as cib
from cib_jax import errors
from cib_jax.commands.compare import make_cell, parse_methods
from cib_jax.commands.evaluate import evaluate
from cib_jax.commands.train import train
from cib_jax.config import build, schema
from cib_jax.errors import ConfigError, WorkdirError
from cib_jax.inference.serialization import restore_best
from cib_jax.runs.workdir import adopt, find_owner, read_json, take_ownership, validate_owner, write_json
from cib_jax.training.checkpoint import Checkpoints
from tests import small
from tests.commands.test_train import assert_same, interrupted

pytestmark = pytest.mark.usefixtures("compiled_to_run", "few_digits")


@pytest.fixture
def console():
    return rich.console.Console(record=True, width=100)


def placed(where, **fields):
    return small.config(**small.FEW_DIGITS, train__checkpoint_dir=str(where), epochs=2, **fields)


def params_of(workdir, config):
    return restore_best(workdir, build.encoder(config)[1], config)[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain") / "r"
    results = train(placed(""), workdir, console=rich.console.Console(quiet=True))
    return workdir, results


def copied(plain, to):
    """A run like any other, but for its path, that has its checkpoints in a place of its own."""
    shutil.copytree(plain[0], to / "r")
    shutil.move(to / "r" / "checkpoints", to / "place")
    return to / "r", to / "place"


def test_a_run_cut_in_two_with_its_checkpoints_under_a_uri_comes_to_the_same(plain, tmp_path, console, monkeypatch):
    where = tmp_path / "far" / "away"
    config = placed(f"file://{where}")
    interrupted(monkeypatch, config, tmp_path / "r", console, 5)
    assert not (tmp_path / "r" / "checkpoints").exists() and (where / "4").is_dir()
    assert train(config, tmp_path / "r", console=console)["map"] == plain[1]["map"]
    assert "Going on after epoch 1 of 2" in console.export_text()
    assert_same(params_of(tmp_path / "r", config), params_of(plain[0], placed("")))
    assert evaluate(tmp_path / "r", console=console)["metrics"] == plain[1]["metrics"]
    images = np.arange(576, dtype=np.uint8).reshape(3, 8, 8, 3)
    assert np.array_equal(*(cib.Hasher.load(workdir).encode(images) for workdir in (tmp_path / "r", plain[0])))


def test_a_damaged_checkpoint_is_set_aside_where_it_lies(plain, tmp_path, console):
    workdir, where = copied(plain, tmp_path)
    (workdir / "results.json").unlink()
    for file in (where / "8").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-9])
    assert train(placed(where), workdir, console=console)["map"] == plain[1]["map"]
    assert (where / "damaged-8").is_dir() and (where / "8").is_dir()
    assert_same(params_of(workdir, placed(where)), params_of(plain[0], placed("")))


def test_checkpoints_may_be_moved_but_not_left_behind(plain, tmp_path, console):
    workdir, where = copied(plain, tmp_path)
    images = np.arange(576, dtype=np.uint8).reshape(3, 8, 8, 3)
    with pytest.raises(cib.Refusal, match="--workdir"):
        cib.Hasher.load(workdir)
    moved = cib.Hasher.load(workdir, checkpoint_dir=str(where)).encode(images)
    assert np.array_equal(moved, cib.Hasher.load(plain[0]).encode(images))
    assert evaluate(workdir, overrides={"train.checkpoint_dir": str(where)}, console=console)["map"] == plain[1]["map"]
    (workdir / "results.json").unlink()
    assert train(placed(where), workdir, console=console)["map"] == plain[1]["map"]
    assert np.array_equal(*(cib.Hasher.load(run).encode(images) for run in (workdir, plain[0])))
    (workdir / "results.json").unlink()
    with pytest.raises(WorkdirError, match=r"/place.*/elsewhere") as caught:
        train(placed(tmp_path / "elsewhere"), workdir, console=console)
    assert caught.value.field == "config.train.checkpoint_dir"


def test_two_workdirs_do_not_share_a_place(plain, tmp_path, console):
    workdir, where = copied(plain, tmp_path)
    first = take_ownership(workdir, placed(where))
    with pytest.raises(WorkdirError, match=rf"{where} .*{workdir}") as caught:
        train(placed(where), tmp_path / "other", console=console)
    assert caught.value.field == "config.train.checkpoint_dir"
    with pytest.raises(WorkdirError, match=r"temperature: 0\.5 → 0\.1"):
        (workdir / "results.json").unlink()
        train(placed(where, temperature=0.1), workdir, console=console)
    first.check()
    with pytest.raises(WorkdirError, match="workdir of another run") as caught:
        find_owner(tmp_path / "other", placed(plain[0] / "checkpoints"))
    assert caught.value.field == "config.train.checkpoint_dir"


def test_a_second_session_of_one_workdir_ends_the_first_before_its_next_save(tmp_path, console, monkeypatch):
    """As where the same command runs on two machines, whose locks do not see each other."""
    config, real = placed(tmp_path / "place"), Checkpoints.save

    def taken_over(checkpoints, state, progress, extra):
        real(checkpoints, state, progress, extra)
        if progress.epoch == 1:
            take_ownership(tmp_path / "r", config)

    monkeypatch.setattr(Checkpoints, "save", taken_over)
    with pytest.raises(WorkdirError, match=str(tmp_path / "r")):
        train(config, tmp_path / "r", console=console)
    with Checkpoints(tmp_path / "place", read_only=True) as checkpoints:
        assert checkpoints.latest_step == 4


def test_a_workdir_that_was_moved_keeps_its_checkpoints_and_its_copy_does_not(tmp_path):
    config = placed(tmp_path / "place")
    (tmp_path / "a").mkdir()
    take_ownership(tmp_path / "a", config)
    shutil.move(tmp_path / "a", tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    take_ownership(tmp_path / "b", config)
    with pytest.raises(WorkdirError, match="/b;"):
        take_ownership(tmp_path / "c", config)
    (tmp_path / "place" / "owner.json").write_text('{"work')
    with pytest.raises(WorkdirError, match=r"owner\.json"):
        find_owner(tmp_path / "b", config)


@pytest.mark.parametrize(
    "words", ["runs/1", "file://relative/x", "s3://bucket/run", "gs://bucket", "az://a/b", "gs://"]
)
def test_places_that_cannot_work_are_refused_by_their_form(words):
    with pytest.raises(ConfigError) as caught:
        schema.validate(placed(words))
    assert caught.value.field == "config.train.checkpoint_dir" and repr(words) in str(caught.value)


def test_a_bucket_without_its_package_names_what_to_install(tmp_path, console, monkeypatch):
    schema.validate(placed("gs://bucket/run"))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(errors.CheckpointError, match=r"gs://bucket/run .*pip install .*\[gcs\]'"):
        train(placed("gs://bucket/run"), tmp_path / "r", console=console)


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "r").mkdir()
    with pytest.raises(errors.CheckpointError, match=r"file/place .*NotADirectoryError"):
        take_ownership(tmp_path / "r", placed(tmp_path / "file" / "place"))


def test_runs_of_a_comparison_get_places_of_their_own(tmp_path):
    (row,), bucket = parse_methods("cibhash"), placed("gs://bucket/t/")
    one, other = (make_cell(bucket, row, 16, seed, tmp_path).config for seed in (0, 1))
    assert one.train.checkpoint_dir == "gs://bucket/t/cibhash/16-bits-seed-0"
    assert other.train.checkpoint_dir != one.train.checkpoint_dir
    alone = make_cell(placed(""), row, 16, 0, tmp_path)
    assert alone.config.train.checkpoint_dir == ""


def test_a_run_of_an_earlier_version_has_its_checkpoints_in_its_workdir(plain, tmp_path, console):
    shutil.copytree(plain[0], tmp_path / "r")
    fields = read_json(tmp_path / "r" / "config.json")
    del fields["train"]["checkpoint_dir"]
    write_json(tmp_path / "r" / "config.json", fields)
    assert evaluate(tmp_path / "r", console=console)["map"] == plain[1]["map"]
    assert jax.tree.leaves(cib.Hasher.load(pathlib.Path(tmp_path / "r")).params)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, "\ud800"])
def test_damaged_json_is_one_error(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(WorkdirError):
        read_json(tmp_path / "file.json")
    (tmp_path / "file.json").unlink()
    os.mkfifo(tmp_path / "file.json")
    with pytest.raises(WorkdirError):
        read_json(tmp_path / "file.json")


RECORDS = {
    "results.json": {
        "map": None,
        "map_tie_aware": 0.5,
        "k": 9,
        "metrics": {"code_health": {"entropy": 0.5, "mean_abs_correlation": 0}},
        "seconds": {"train": 1.5},
    },
    "trial.json": {"number": 0, "params": {}, "value": None, "scores": {}, "error": ""},
    "refused.json": {"error": "", "when": 0.5},
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_without_its_fields_is_one_error(tmp_path, name):
    path = tmp_path / name
    write_json(path, RECORDS[name])
    assert read_json(path) == RECORDS[name]
    for field in RECORDS[name]:
        for crafted in (
            {},
            RECORDS[name] | {field: []},
            {one: RECORDS[name][one] for one in RECORDS[name].keys() - {field}},
        ):
            write_json(path, crafted)
            with pytest.raises(WorkdirError, match=f"{name}.*damaged"):
                read_json(path)


@pytest.mark.parametrize(
    "crafted",
    [
        {"map": math.inf},
        {"seconds": {"train": "x"}},
        {"metrics": {"code_health": {"entropy": 1}}},
        {"data": {}},
        {"backbone_fingerprint": []},
    ],
)
def test_results_with_crafted_fields_are_one_error(tmp_path, crafted):
    write_json(tmp_path / "results.json", RECORDS["results.json"] | crafted)
    with pytest.raises(WorkdirError, match=r"results.json.*damaged"):
        read_json(tmp_path / "results.json")


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000])
def test_a_damaged_owner_is_one_error(tmp_path, content):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "owner.json").write_text(content)
    with pytest.raises(WorkdirError):
        find_owner(tmp_path / "r", placed(tmp_path / "place"))


@pytest.mark.parametrize("config", [None, 3, {"a.b": 1}, {"bits": []}])
def test_a_checkpoint_with_another_config_is_one_error(plain, tmp_path, config):
    """Its checksum covers the state alone, as version 0.1.0 wrote it, so that this is not noticed by it."""
    shutil.copytree(plain[0], tmp_path / "r")
    for file in (tmp_path / "r" / "checkpoints").glob("*/extra/metadata"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"config": config}))
    with pytest.raises(errors.CheckpointError):
        cib.Hasher.load(tmp_path / "r")
    with pytest.raises(errors.UserError):
        validate_owner(tmp_path / "r", placed(""))


def test_a_refused_search_leaves_not_even_the_folder_around_it(tmp_path):
    with pytest.raises(errors.UserError), adopt(tmp_path / "runs" / "s", small.config(), "search"):
        raise errors.UserError("refused", "--config")
    assert not list(tmp_path.iterdir())
