"""Writers: a run that is taken up again goes on elsewhere too, without a step twice, and no writer ends a training.

Weights & Biases and MLflow are small fakes of what is used of them, as strict as the real ones; with `-m slow` the real
ones, where they are installed, write to this disk and are read back.
"""

import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import types

import pytest
import rich.console

from cib_jax.commands import train
from cib_jax.errors import MissingExtraError
from cib_jax.files import install_command
from cib_jax.training import metric_writers
from cib_jax.training.metric_writers import MetricLog
from tests import small

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = {"bits": 16, "data": {"name": "digits", "seed": 3}, "tune": {"space": "a=1|2"}}


def module(name, **contents):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="fake.py")
    vars(made).update(contents)
    return made


class Wandb:
    """What a W&B server holds, or the files of its sessions where there is none; refuses a step that is not new.

    Offline, what was given lately is lost with a session that does not end.
    """

    def __init__(self, online):
        self.online, self.runs, self.exits = online, {}, []

    def init(self, *, project, id, name, dir, config, resume, reinit, settings):
        assert (project, resume, reinit, settings.console) == ("cib_jax", "allow", "create_new", "off")
        known = self.online and id in self.runs
        steps = self.runs.setdefault(id, {"name": name, "config": config, "steps": {}})["steps"]

        lately = {}

        def log(numbers, *, step):
            assert step not in steps and step >= max(steps | lately, default=0)
            (steps if self.online else lately)[step] = numbers

        def finish(exit_code):
            steps.update(lately)
            self.exits.append(exit_code)

        step = max(steps, default=-1) + 1 if known else 0
        return types.SimpleNamespace(step=step, resumed=known, log=log, finish=finish)


class Client:
    """What an MLflow store holds."""

    def __init__(self):
        self.experiments, self.runs = {}, {}

    def __call__(self):
        return self

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name):
        self.experiments[name] = types.SimpleNamespace(experiment_id="7")
        return "7"

    def create_run(self, experiment_id, run_name):
        assert experiment_id == "7"
        identity = f"run{len(self.runs)}"
        self.runs[identity] = {"name": run_name, "params": {}, "metrics": [], "status": "RUNNING"}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=identity))

    def get_run(self, identity):
        if identity not in self.runs:
            raise LookupError(f"Run '{identity}' not found\nand more")
        names = {metric.key for metric in self.runs[identity]["metrics"]}
        return types.SimpleNamespace(data=types.SimpleNamespace(metrics=dict.fromkeys(names, 0.0)))

    def get_metric_history(self, identity, name):
        return [metric for metric in self.runs[identity]["metrics"] if metric.key == name]

    def log_batch(self, identity, metrics=(), params=()):
        assert len(params) <= 100
        self.runs[identity]["metrics"] += metrics
        self.runs[identity]["params"] |= {param.key: param.value for param in params}

    def update_run(self, identity, status):
        self.runs[identity]["status"] = status

    set_terminated = update_run


@pytest.fixture(params=[True, False], ids=["online", "offline"])
def wandb(request, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    fake = Wandb(request.param)
    made = module("wandb", init=fake.init, Settings=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "wandb", made)
    return fake


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    fake = Client()
    entities = types.SimpleNamespace(
        Metric=lambda key, value, timestamp, step: types.SimpleNamespace(key=key, value=value, step=step),
        Param=lambda key, value: types.SimpleNamespace(key=key, value=value),
    )
    made = module("mlflow", MlflowClient=fake, entities=entities, get_tracking_uri=lambda: "sqlite:///x.db")
    monkeypatch.setitem(sys.modules, "mlflow", made)
    return fake


def first_session(workdir, names):
    """One that comes to step 15, and is not ended as it should be."""
    log = MetricLog(workdir, writers=names, config=CONFIG)
    for step in (5, 10, 15):
        log.write(step, {"epoch": step // 5, "loss": 1 / step, "word": "left out"})


def second_session(workdir, names):
    """One that goes on from a checkpoint of step 10, to 20."""
    with MetricLog(workdir, 10, 2, writers=names, config=CONFIG) as log:
        for step in (15, 20):
            log.write(step, {"epoch": step // 5, "loss": 1 / step})


def two_sessions(workdir, names):
    first_session(workdir, names)
    second_session(workdir, names)


def two_real_sessions(workdir, names):
    """In processes of their own, the first of which is killed."""
    imports = "import os, pathlib, sys; from tests.training import test_metric_writers as t; "
    for code, expected in (
        ("t.first_session(pathlib.Path(sys.argv[1]), sys.argv[2]); os.kill(os.getpid(), 9)", -9),
        ("t.second_session(pathlib.Path(sys.argv[1]), sys.argv[2])", 0),
    ):
        command = [sys.executable, "-c", imports + code, str(workdir), names]
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == expected


LOGGED = {step: {"epoch": step // 5, "loss": 1 / step} for step in (5, 10, 15, 20)}


def steps_of(run):
    """Of a run of the fake MLflow, with every value that a step was given."""
    found = {}
    for metric in run["metrics"]:
        assert found.setdefault(metric.step, {}).setdefault(metric.key, metric.value) == metric.value
    assert len(run["metrics"]) == sum(map(len, found.values()))
    return found


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_records_are_appended_and_events_written(tmp_path):
    with MetricLog(tmp_path) as log:
        log.write(5, {"loss": 1.5, "epoch": 1})
        assert records(tmp_path) == [{"step": 5, "loss": 1.5, "epoch": 1}]
        log.write(10, {"loss": 1.25, "epoch": 2})
    assert [record["step"] for record in records(tmp_path)] == [5, 10]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_resumed_run_removes_the_records_that_it_repeats(tmp_path):
    with MetricLog(tmp_path) as log:
        for step in (5, 10, 15):
            log.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')  # killed while writing
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\x00\xff\n[5]\n7\n")
    with MetricLog(tmp_path, resumed_step=10) as log:
        log.write(15, {"loss": 0.5})
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(5, 5.0), (10, 10.0), (15, 0.5)]


def test_a_pipe_or_deep_nesting_in_place_of_the_log_does_not_stop_it(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with MetricLog(tmp_path, 3, 1, writers="") as log:
        log.write(4, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    assert path.read_text() == '{"step": 4, "loss": 1.0}\n'
    path.write_text(path.read_text() + "[" * 100_000 + "\n")
    with MetricLog(tmp_path, 4, 1, writers=""):
        assert path.read_text() == '{"step": 4, "loss": 1.0}\n'


def test_a_run_of_wandb_goes_on_without_a_step_twice(wandb, tmp_path):
    two_sessions(tmp_path, "wandb")
    ((identity, run),) = wandb.runs.items()
    assert run == {"name": str(tmp_path), "config": CONFIG, "steps": LOGGED}
    assert wandb.exits == [0]
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": identity, "step": 20}


def test_what_wandb_has_surely_written_down_is_not_given_again(wandb, tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(metric_writers.time, "monotonic", lambda: now)
    log = MetricLog(tmp_path, writers="wandb")
    for step in (5, 10, 15):
        log.write(step, {"epoch": step // 5, "loss": 1 / step})
        now += metric_writers.FLUSHED_AFTER / 2 + 1
    assert json.loads((tmp_path / "wandb.json").read_text())["step"] == 5  # 32 seconds ago, when 15 was given
    if not wandb.online:
        wandb.runs[json.loads((tmp_path / "wandb.json").read_text())["id"]]["steps"][5] = LOGGED[5]
    second_session(tmp_path, "wandb")
    assert next(iter(wandb.runs.values()))["steps"] == LOGGED


def test_a_run_of_mlflow_goes_on_without_a_step_twice(mlflow, tmp_path):
    two_sessions(tmp_path, "tensorboard, mlflow")
    (run,) = mlflow.runs.values()
    assert steps_of(run) == LOGGED
    assert run["name"] == str(tmp_path) and run["status"] == "FINISHED"
    assert run["params"] == {"bits": "16", "data.name": "digits", "data.seed": "3", "tune.space": "a=1|2"}


def test_a_run_from_the_beginning_is_another_one_there(wandb, mlflow, tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), MetricLog(tmp_path, writers="wandb, mlflow") as log:
            log.write(5, {"loss": 1.0})
            raise KeyboardInterrupt
    assert [run["steps"] for run in wandb.runs.values()] == [{5: {"loss": 1.0}}] * 2
    assert wandb.exits == [1, 1]
    assert [run["status"] for run in mlflow.runs.values()] == ["KILLED"] * 2


def test_a_writer_that_is_named_later_gets_what_was_before(wandb, mlflow, tmp_path):
    with MetricLog(tmp_path, writers="") as log:
        for step in (5, 10, 15):
            log.write(step, {"loss": float(step)})
    assert not (tmp_path / "tensorboard").exists()
    with MetricLog(tmp_path, 10, writers="wandb,mlflow,tensorboard") as log:
        log.write(15, {"loss": 0.5})
    assert next(iter(wandb.runs.values()))["steps"] == {5: {"loss": 5.0}, 10: {"loss": 10.0}, 15: {"loss": 0.5}}
    assert sorted(steps_of(mlflow.runs["run0"])) == [5, 10, 15]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_one_that_fails_is_reported_once_and_the_others_go_on(wandb, mlflow, tmp_path, monkeypatch):
    warnings = []
    with MetricLog(tmp_path, writers="mlflow,wandb", warn=warnings.append) as log:
        log.write(5, {"loss": 1.0})
        monkeypatch.setattr(Client, "log_batch", lambda *_, **__: 1 / 0)
        monkeypatch.setattr(Client, "set_terminated", lambda *_, **__: 1 / 0)
        for step in (10, 15):
            log.write(step, {"loss": 1.0})
    assert len(warnings) == 1 and warnings[0].startswith("mlflow failed (ZeroDivisionError: division by zero)")
    assert list(next(iter(wandb.runs.values()))["steps"]) == [5, 10, 15]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert wandb.exits == [0]


def test_one_that_fails_at_the_end_is_reported(mlflow, tmp_path, monkeypatch):
    monkeypatch.setattr(Client, "set_terminated", lambda *_, **__: 1 / 0)
    warnings = []
    with MetricLog(tmp_path, writers="mlflow", warn=warnings.append):
        pass
    assert len(warnings) == 1 and warnings[0].startswith("mlflow failed (ZeroDivisionError")


@pytest.mark.parametrize("name", metric_writers.EXTRAS)
def test_a_missing_package_is_named_with_its_extra(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()  # as W&B leaves behind, which Python takes for a package of no files
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingExtraError, match=re.escape(install_command(name))) as refused:
        train.train(small.config(log__writers=f"tensorboard, {name}"), tmp_path / "run")
    assert refused.value.field == "config.log.writers"
    assert not (tmp_path / "run").exists()


def test_one_that_does_not_start_is_refused(mlflow, wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(Client, "create_run", lambda *_, **__: 1 / 0)
    with pytest.raises(MissingExtraError, match=r"mlflow .*division by zero") as refused:
        MetricLog(tmp_path, writers="wandb,mlflow")
    assert refused.value.field == "config.log.writers"
    assert wandb.exits == [1]


def test_a_run_that_is_gone_elsewhere_is_refused(mlflow, tmp_path):
    with MetricLog(tmp_path, writers="mlflow"):
        pass
    mlflow.runs.clear()
    with pytest.raises(MissingExtraError, match=r"run0.*MLFLOW_TRACKING_URI=sqlite:///x.db") as refused:
        MetricLog(tmp_path, 10, writers="mlflow")
    assert refused.value.field == "config.log.writers"
    (tmp_path / "mlflow.json").write_text("{")
    with pytest.raises(MissingExtraError) as refused:
        MetricLog(tmp_path, 10, writers="mlflow")
    assert refused.value.field == str(tmp_path / "mlflow.json")


@pytest.mark.usefixtures("few_digits")
def test_a_run_gives_them_its_config_and_every_epoch(wandb, tmp_path):
    config = small.config(**small.FEW_DIGITS, epochs=2, log__writers="wandb")
    train.train(config, tmp_path / "run", console=rich.console.Console(quiet=True))
    (run,) = wandb.runs.values()
    assert run["config"] == config.to_dict()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [numbers["epoch"] for numbers in run["steps"].values()] == [1, 2]
    assert [{"step": step} | numbers for step, numbers in run["steps"].items()] == records
    assert wandb.exits == [0]


def installed(name):
    return getattr(importlib.util.find_spec(name), "origin", None) is not None


@pytest.mark.slow
@pytest.mark.skipif(not installed("mlflow"), reason="MLflow is not installed: the extra mlflow")
def test_what_the_real_mlflow_reads(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    two_real_sessions(tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("cib_jax").experiment_id])
    for name in ("epoch", "loss"):
        history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        assert history == [(step, numbers[name]) for step, numbers in LOGGED.items()]
    assert run.info.status == "FINISHED" and run.info.run_name == str(tmp_path)
    assert run.data.params == {"bits": "16", "data.name": "digits", "data.seed": "3", "tune.space": "a=1|2"}


def wandb_records(path):
    """Yields what a file of an offline session holds: LevelDB's log format with seven bytes before it, of protobufs."""
    from wandb.proto import wandb_internal_pb2

    content, at, block = path.read_bytes(), 7, 32768
    assert content[:4] == b":W&B"
    whole = b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole one, or the end of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


@pytest.mark.slow
@pytest.mark.skipif(not installed("wandb"), reason="Weights & Biases is not installed: the extra wandb")
def test_what_the_real_wandb_keeps_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    two_real_sessions(tmp_path, "wandb")
    found, runs = {}, set()
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
            if record.WhichOneof("record_type") == "history":
                assert record.history.step.num not in found
                items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
                found[record.history.step.num] = {name: json.loads(items[name]) for name in ("epoch", "loss")}
    assert found == LOGGED
    assert runs == {(json.loads((tmp_path / "wandb.json").read_text())["id"], "cib_jax", str(tmp_path))}
