"""The log: whole lines of JSON, events beside them, and records taken back on a resumed run."""

import json

from cib_jax.training.metric_writers import MetricLog


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_records_are_appended_and_events_written(tmp_path):
    with MetricLog(tmp_path) as log:
        log.write(5, {"loss": 1.5, "epoch": 1})
        assert records(tmp_path) == [{"step": 5, "loss": 1.5, "epoch": 1}]
        log.write(10, {"loss": 1.25, "epoch": 2})
    assert [record["step"] for record in records(tmp_path)] == [5, 10]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_resumed_run_takes_back_what_it_makes_again(tmp_path):
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
