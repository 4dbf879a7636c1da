"""`--mode=train` on a few digits: its files, resuming to the same bits, validation, refusals."""

import contextlib
import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
import rich.console

import cib_jax as cib
from cib_jax.commands.evaluate import evaluate
from cib_jax.commands.train import train
from cib_jax.config import build
from cib_jax.distributed import multihost
from cib_jax.errors import ConfigError, DataError, TrainingError, UserError, WorkdirError
from cib_jax.retrieval import code_quality
from cib_jax.runs.workdir import claim_workdir, write_json
from cib_jax.training import loop
from tests import pretrained
from tests import small as small_runs
from tests.commands import many
from tests.data import miniature

pytestmark = pytest.mark.usefixtures("compiled_to_run", "few_digits")


def small(**fields):
    """Returns the config of a small run, on views of 8 pixels."""
    return small_runs.config(**small_runs.FEW_DIGITS | {"image_size": 8} | fields)


@pytest.fixture
def console():
    return rich.console.Console(record=True, width=100)


def params_of(workdir):
    return cib.Hasher.load(workdir).params


def assert_same(a, b):
    assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "r"
    results = train(small(), workdir, console=rich.console.Console(quiet=True))
    return workdir, results


def test_the_results_say_what_was_measured(trained):
    workdir, results = trained
    written = json.loads((workdir / "results.json").read_text())
    assert (written["map"], written["metrics"]) == (results["map"], results["metrics"])
    assert (results["dataset"], results["backbone"], results["objective"]) == ("few digits", "convnet", "cibhash")
    assert (results["bits"], results["k"], results["seed"], results["epochs"]) == (16, 100, 0, 3)
    assert results["counts"] == {"train": 130, "query": 60, "database": 340, "validation": 0, "unreadable": 0}
    assert set(results["seconds"]) == {"bank", "train", "encode", "metrics"}
    assert results["versions"]["jax"] == jax.__version__


def reference_map(workdir, k):
    """MAP@k by a loop over the published definition, from codes/ alone."""
    load = {path.stem: np.load(path) for path in (workdir / "codes").glob("*.npy")}
    precisions = []
    for code, label in zip(load["query_codes"], load["query_labels"], strict=True):
        distances = np.unpackbits(code ^ load["database_codes"], axis=1).sum(1)
        hits = load["database_labels"][np.argsort(distances, kind="stable")[:k]] == label
        precisions.append((np.cumsum(hits) / np.arange(1, k + 1))[hits].mean() if hits.any() else 0.0)
    return np.mean(precisions)


def test_the_figures_are_those_of_the_codes_on_disk(trained):
    workdir, results = trained
    np.testing.assert_allclose(results["map"], reference_map(workdir, 100), rtol=1e-12)


def test_a_run_whose_best_checkpoint_is_damaged_begins_again_to_the_same(tmp_path, console, monkeypatch):
    """What it would be judged by is gone; the whole way leads there again."""
    scores = iter([0.5, 0.4, 0.3, 0.5, 0.4, 0.3])
    monkeypatch.setattr("cib_jax.retrieval.metrics.mean_average_precision", lambda *_, **__: next(scores))
    config = many.config(tmp_path, epochs=3, data__validation="query_half", train__validate_every=1)
    train(config, tmp_path / "run", console=rich.console.Console(quiet=True))
    judged = params_of(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    for file in (tmp_path / "run" / "checkpoints" / "3" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-9])
    results = train(config, tmp_path / "run", console=console)
    assert "it was the best one, so training begins again" in console.export_text()
    assert results["best_validation_map"] == 0.5
    assert_same(params_of(tmp_path / "run"), judged)


@pytest.mark.parametrize("after", [10, 12])
def test_a_run_stopped_after_any_step_is_saved_there_and_goes_on_to_the_same(
    trained, tmp_path, console, monkeypatch, after
):
    """Four steps an epoch: in the middle of one, and after the last of all."""
    asked = iter([False] * (after - 1) + [True])
    with monkeypatch.context() as patched:
        patched.setattr(
            "cib_jax.distributed.multihost.sigterm_flag", lambda: contextlib.nullcontext(lambda: next(asked))
        )
        with pytest.raises(multihost.Preempted) as stopped:
            train(small(), tmp_path / "run", console=console)
    assert stopped.value.code == multihost.PREEMPTED_CODE == 75
    assert f"step {after}, in epoch {(after - 1) // 4 + 1} of 3, is saved in {tmp_path}" in stopped.value.message
    results = train(small(), tmp_path / "run", console=console)
    assert f"Going on after step {after}, in epoch {(after - 1) // 4 + 1} of 3" in console.export_text()
    assert results["map"] == trained[1]["map"] and results["epochs"] == 3
    assert_same(params_of(tmp_path / "run"), params_of(trained[0]))
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path / "run", trained[0])]
    for mine, whole in zip(*(map(json.loads, part) for part in lines), strict=True):
        assert {k: v for k, v in mine.items() if "second" not in k} == pytest.approx(
            {k: v for k, v in whole.items() if "second" not in k}, abs=1e-12
        )


def test_a_workdir_describes_itself(trained):
    workdir, _ = trained
    assert json.loads((workdir / "config.json").read_text())["data"]["name"] == "few digits"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert {"loss", "contrast", "kl", "gradient_norm", "images_per_second"} <= set(lines[0])


def test_the_hasher_gives_the_codes_of_the_run(trained):
    workdir, _ = trained
    splits = build.draw_splits(small())
    images = np.stack([splits.query.images[i] for i in range(len(splits.query))])
    assert np.array_equal(cib.Hasher.load(workdir).encode(images), np.load(workdir / "codes" / "query_codes.npy"))


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same(trained, tmp_path, console):
    workdir, results = trained
    shutil.copytree(workdir, tmp_path / "r")
    (tmp_path / "r" / "results.json").unlink()
    newest = max((tmp_path / "r" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for file in newest.rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    assert train(small(), tmp_path / "r", console=console)["map"] == results["map"]
    said = console.export_text(clear=False).replace("\n", " ")
    assert "damaged-12" in said and "Going on after epoch 2 of 3" in said
    assert_same(params_of(tmp_path / "r"), params_of(workdir))
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_a_finished_run_is_not_touched(trained, console):
    workdir, results = trained
    before = (workdir / "results.json").stat().st_mtime_ns
    assert train(small(), workdir, console=console)["map"] == results["map"]
    assert (workdir / "results.json").stat().st_mtime_ns == before
    assert "holds a finished run" in console.export_text()


def test_a_run_keeps_the_dtype_with_which_it_began(tmp_path, console):
    """A run that began on a TPU goes on in bfloat16 elsewhere, unless it is asked for something else."""
    train(many.config(tmp_path, epochs=1, backbone_dtype="bfloat16"), tmp_path / "r", console=console)
    train(many.config(tmp_path, epochs=1, backbone_dtype="auto"), tmp_path / "r", console=console)
    assert "holds a finished run" in console.export_text()
    assert cib.Hasher.load(tmp_path / "r").encoder.backbone_dtype == "bfloat16"
    with pytest.raises(WorkdirError, match="backbone_dtype"):
        train(many.config(tmp_path, epochs=1, backbone_dtype="float32"), tmp_path / "r", console=console)


def test_evaluation_alone_gives_the_same_figures(trained, console):
    workdir, results = trained
    again = evaluate(workdir, console=console)
    assert again["map"] == results["map"]
    assert again["metrics"] == results["metrics"]
    other = evaluate(workdir, overrides={"k": 10}, console=console)
    assert other["k"] == 10
    assert json.loads((workdir / "results-epoch3-k10.json").read_text()) == other
    assert json.loads((workdir / "results.json").read_text())["k"] == 100
    with pytest.raises(ConfigError) as caught:
        evaluate(workdir, overrides={"bits": 32}, console=console)
    assert caught.value.field == "config.bits" and "16" in str(caught.value)


class Interrupted(BaseException):
    """Stands for whatever ends a process between two checkpoints."""


def interrupted(monkeypatch, config, workdir, console, steps):
    """Trains until so many steps were taken."""
    run_loop = loop.run

    def stopping(*arguments, hooks, **options):
        taken = itertools.count(1)

        def stop():
            if next(taken) == steps:
                raise Interrupted
            return False

        return run_loop(*arguments, hooks=dataclasses.replace(hooks, stop=stop), **options)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "run", stopping)
        with pytest.raises(Interrupted):
            train(config, workdir, console=console)


def test_an_interrupted_run_is_evaluated_unfinished_and_resumes_to_the_same(trained, tmp_path, console, monkeypatch):
    workdir, results = trained
    interrupted(monkeypatch, small(), tmp_path / "cut", console, 6)
    assert evaluate(tmp_path / "cut", console=console)["epochs"] == 1
    assert "training stopped at epoch 1 of 3" in console.export_text(clear=False)
    resumed = train(small(), tmp_path / "cut", console=console)
    assert "Going on after epoch 1 of 3" in console.export_text()
    assert_same(params_of(workdir), params_of(tmp_path / "cut"))
    assert resumed["map"] == results["map"]
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("how", [{"data__validation": "query_half"}, {"train__validate_by": "separation"}])
def test_a_validated_run_interrupted_after_its_best_resumes_to_the_same_end(tmp_path, console, monkeypatch, how):
    streamed = {"data__resident_mb": 0, "train__validate_every": 1}
    config = many.config(tmp_path, epochs=4, train__patience=3, **streamed | how)
    whole = train(config, tmp_path / "whole", console=console)
    interrupted(monkeypatch, config, tmp_path / "cut", console, 8)
    resumed = train(config, tmp_path / "cut", console=console)
    for name in ("map", "best_validation_map", "best_separation", "epochs"):
        assert resumed[name] == whole[name]
    assert_same(params_of(tmp_path / "whole"), params_of(tmp_path / "cut"))


def test_a_run_is_known_by_its_checkpoint_where_its_config_is_lost_or_edited(trained, tmp_path, console):
    shutil.copytree(trained[0], tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(path.read_text().replace('"bits": 16', '"bits": 32'))
    for look in (lambda: evaluate(tmp_path / "copy", console=console), lambda: cib.Hasher.load(tmp_path / "copy")):
        with pytest.raises(UserError, match="bits: 16"):
            look()
    path.unlink()
    with pytest.raises(WorkdirError, match=r"temperature: 0\.5 → 0\.1"):
        train(small(temperature=0.1), tmp_path / "copy", console=console)


def test_a_refused_config_claims_nothing(tmp_path, console):
    with pytest.raises(ConfigError):
        train(small(k=341, epochs=1), tmp_path / "run", console=console)
    assert train(small(k=100, epochs=1), tmp_path / "run", console=console)["k"] == 100


def test_a_folder_of_something_else_is_not_filled(tmp_path, console):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(WorkdirError, match=r"holiday\.jpg"):
        train(small(), tmp_path, console=console)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.slow
def test_streamed_images_train_to_the_same_bits_as_resident_ones(trained, tmp_path, console):
    """Of two steps, nearly the same: tests/training/test_input_pipeline.py."""
    workdir, _ = trained
    config = small(data__resident_mb=0)
    train(config, tmp_path / "streamed", console=console)
    assert_same(params_of(workdir), params_of(tmp_path / "streamed"))


def test_validation_keeps_the_best_checkpoint_and_stops_early(tmp_path, console, monkeypatch):
    scores = iter([0.2, 0.6, 0.5, 0.4, 0.0])
    monkeypatch.setattr("cib_jax.retrieval.metrics.mean_average_precision", lambda *_, **__: next(scores))
    held_out = {"data__validation": "query_half"}
    config = many.config(tmp_path, epochs=9, train__patience=2, train__validate_every=1, **held_out)
    results = train(config, tmp_path / "r", console=console)
    assert (results["epochs"], results["best_validation_map"]) == (4, 0.6)
    assert results["counts"]["validation"] == 15
    two_epochs = many.config(tmp_path, epochs=2, train__validate_every=3, **held_out)
    train(two_epochs, tmp_path / "two", console=console)
    assert_same(params_of(tmp_path / "r"), params_of(tmp_path / "two"))


@pytest.mark.parametrize("how", ["query_half", "database"])
def test_validation_is_the_map_of_the_part_held_out(tmp_path, console, how):
    config = small(epochs=1, data__validation=how, data__validation_queries=50)
    results = train(config, tmp_path, console=console)
    query, database = build.draw_splits(config).validation
    hasher = cib.Hasher.load(tmp_path)
    codes = [hasher.encode(np.stack([part.images[i] for i in range(len(part))])) for part in (query, database)]
    expected = cib.mean_average_precision(*codes, query.labels, database.labels, k=100)
    assert results["best_validation_map"] == expected


def test_validation_by_separation_needs_no_labels_and_holds_nothing_out(tmp_path, console):
    without = {"data__labelled": False, "train__validate_by": "separation", "train__validate_every": 1}
    config = many.config(tmp_path, epochs=6, train__patience=2, **without)
    results = train(config, tmp_path / "r", console=console)
    assert (results["counts"]["train"], results["counts"]["validation"], results["map"]) == (120, 0, None)
    scores = [json.loads(line)["separation"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert len(scores) == results["epochs"] == min(6, int(np.argmax(scores)) + 1 + 2)
    assert results["best_validation_map"] is None and results["best_separation"] == max(scores)
    trained = build.draw_splits(config).train
    codes = cib.Hasher.load(tmp_path / "r").encode(np.stack([trained.images[i] for i in range(len(trained))]))
    assert code_quality.separation(codes) == max(scores)


def test_a_frozen_backbone_with_a_bank_and_validation_on_tfds_files(tmp_path, console, monkeypatch):
    data = miniature.prepare(tmp_path / "tfds")
    config = small(
        data__name="cifar10",
        data__dir=str(data),
        data__queries=0,
        data__train_per_class=4,
        data__validation="query_half",
        train__views=2,
        train__validate_every=1,
        k=50,
        **pretrained.convnet(monkeypatch, tmp_path, 8),
    )
    results = train(config, tmp_path / "run", console=console)
    assert results["counts"] == {"train": 40, "query": 10, "database": 100, "validation": 10, "unreadable": 0}
    np.testing.assert_allclose(results["map"], reference_map(tmp_path / "run", 50), rtol=1e-12)
    assert results["seconds"]["bank"] > 0
    hasher = cib.Hasher.load(tmp_path / "run")
    assert set(hasher.params) == {"head"}
    monkeypatch.setattr(build.weights, "fingerprint", lambda tree: "0" * 16)
    with pytest.raises(UserError, match="0000000000000000"):
        cib.Hasher.load(tmp_path / "run")


def test_a_refusal_leaves_no_empty_folder_behind(tmp_path, console):
    """Without --workdir, every mistake left a folder under runs/."""
    config = small(k=341)
    (tmp_path / "mine").mkdir()
    for workdir in (tmp_path / "new" / "run", tmp_path / "mine"):
        with pytest.raises(ConfigError):
            train(config, workdir, console=console)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"], "nor the parent, such as runs/"


def test_a_run_begins_with_the_weights_of_another(tmp_path, console):
    """At a learning rate of nearly 0, its codes stay those of the other; weights of another shape are refused."""
    first = train(many.config(tmp_path), tmp_path / "first", console=console)
    more = {"init_from": str(tmp_path / "first"), "learning_rate": 1e-12, "epochs": 1}
    again = train(many.config(tmp_path, **more), tmp_path / "again", console=console)
    assert again["map"] == first["map"]
    features = np.load(tmp_path / "features.npy")
    hasher = cib.Hasher.load(tmp_path / "first")
    made = {"bits": 16, "hidden": 32, "epochs": 1, "learning_rate": 1e-12, "batch_size": 32}
    assert_same(cib.fit(features, init_from=hasher, **made).params, hasher.params)
    for fields in ({"bits": 8}, {"init_from": str(tmp_path / "nowhere")}):
        with pytest.raises(ConfigError) as error:
            train(many.config(tmp_path, **more | fields), tmp_path / "refused", console=console)
        assert error.value.field == "config.init_from"
        assert not (tmp_path / "refused").exists()


def test_a_loss_that_is_not_finite_names_step_terms_and_checkpoint(tmp_path, console):
    config = many.config(tmp_path, learning_rate=1e38, epochs=5)
    with pytest.raises(TrainingError, match=r"step \d+: .*loss.*/\d+") as refused:
        train(config, tmp_path / "run", console=console)
    assert refused.value.field == "config.learning_rate"
    params = params_of(tmp_path / "run")
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        ({"k": 341}, ConfigError, "config.k"),
        ({"batch_size": 131}, ConfigError, "config.batch_size"),
        ({"data__train_per_class": 500}, DataError, "config.data.train_per_class"),
        ({"micro_batch": 5}, ConfigError, "config.micro_batch"),
    ],
)
def test_what_cannot_work_is_refused_before_the_folder_is_claimed(tmp_path, console, fields, kind, field):
    with pytest.raises(kind) as refused:
        train(small(**fields), tmp_path / "run", console=console)
    assert refused.value.field == field
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_that_is_taken_is_refused(tmp_path, console, trained):
    with pytest.raises(WorkdirError, match="bits: 16 → 32"):
        train(small(bits=32), trained[0], console=console)
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="file"):
        train(small(), tmp_path / "file", console=console)
    with claim_workdir(tmp_path / "busy"), pytest.raises(WorkdirError, match="busy"):
        train(small(), tmp_path / "busy", console=console)


def test_an_evaluation_needs_a_trained_run(tmp_path, console):
    with pytest.raises(UserError, match="--workdir"):
        evaluate(tmp_path, console=console)
    write_json(tmp_path / "config.json", small().to_dict())
    with pytest.raises(UserError, match="--workdir"):
        evaluate(tmp_path, console=console)
