"""Logs of a run's metrics: metrics.jsonl, and writers to TensorBoard, Weights & Biases and MLflow."""

import contextlib
import json
import os
import pathlib
import secrets
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from cib_jax import files
from cib_jax.errors import MissingExtraError
from cib_jax.files import install_command, is_installed

Numbers = dict[str, float | int]
PROJECT = "cib_jax"  # or experiment, of the runs in a tracking service, unless the environment names another one
PARAMETERS_AT_ONCE, LONGEST_VALUE = 100, 6000  # of MLflow: most parameters in a call, most characters of a value
FLUSHED_AFTER = 30.0  # seconds after which W&B has surely stored what it was given: it does so every 15 seconds


class RunInfo(NamedTuple):
    """A run, as writers need it; groups of the config are nested dictionaries."""

    workdir: pathlib.Path
    config: dict[str, Any]
    resumed: bool  # from a checkpoint; if not, runs of earlier sessions in a service are left as they are
    last_step: int  # in metrics.jsonl; 0 if there is none


@runtime_checkable
class MetricWriter(Protocol):
    """A writer of metrics by step."""

    last_step: int
    """The last step that was written. A resumed run repeats steps, which must not be written twice."""

    def write(self, step: int, numbers: Numbers) -> None:
        """Writes the numbers of a step greater than `last_step`."""

    def close(self, *, finished: bool) -> None:
        """Ends the session; `finished` is whether training came to its end."""


class TensorBoard:
    """Writes events to tensorboard/ in the workdir; events of steps that are repeated are marked as void."""

    def __init__(self, run: RunInfo):
        import tensorboardX

        folder = run.workdir / "tensorboard"
        self.last_step = run.last_step if any(folder.glob("events.*")) else 0
        self._events = tensorboardX.SummaryWriter(str(folder), purge_step=self.last_step + 1)

    def write(self, step: int, numbers: Numbers) -> None:
        """Implements `MetricWriter`."""
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)
        self.last_step = step

    def close(self, *, finished: bool) -> None:
        """Implements `MetricWriter`."""
        self._events.close()


class WeightsAndBiases:
    """Writes to a run of Weights & Biases, with its files in wandb/ in the workdir.

    Its history can only be appended to, so that wandb.json keeps the id of the run and the last step that is surely
    stored. After a killed session, the server knows the last step; offline, the last records may be written twice.
    Environment variables such as WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE=offline have their usual effect.
    """

    def __init__(self, run: RunInfo):
        import wandb

        self._path = run.workdir / "wandb.json"
        notes = _read_notes(self._path) if run.resumed else {}
        self._id = str(notes.get("id", secrets.token_hex(4)))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=self._id,
            name=os.environ.get("WANDB_NAME") or str(run.workdir),
            dir=str(run.workdir),
            config=run.config,
            resume="allow",
            reinit="create_new",  # a run that the caller has open is another one
            settings=wandb.Settings(console="off"),  # the progress bar is not worth logging
        )
        self._stored = self._run.step - 1 if self._run.resumed else int(notes.get("step", 0))
        self.last_step = self._stored
        self._pending: list[tuple[float, int]] = []
        self._note()

    def write(self, step: int, numbers: Numbers) -> None:
        """Implements `MetricWriter`."""
        self._run.log(numbers, step=step)
        self.last_step = step
        now = time.monotonic()
        self._pending.append((now, step))
        while now - self._pending[0][0] > FLUSHED_AFTER:
            self._stored = self._pending.pop(0)[1]
        self._note()

    def close(self, *, finished: bool) -> None:
        """Implements `MetricWriter`."""
        self._run.finish(exit_code=0 if finished else 1)
        self._stored = self.last_step
        self._note()

    def _note(self) -> None:
        _write_notes(self._path, {"id": self._id, "step": self._stored})


class MLflow:
    """Writes to a run of MLflow in the store MLFLOW_TRACKING_URI; mlflow.json keeps its id and the store."""

    def __init__(self, run: RunInfo):
        import mlflow
        from flax.traverse_util import flatten_dict

        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        path, store = run.workdir / "mlflow.json", mlflow.get_tracking_uri()
        notes = _read_notes(path) if run.resumed else {}
        self._id = str(notes.get("run_id", ""))
        if self._id:
            try:
                had = self._client.get_run(self._id).data.metrics
            except Exception as error:
                raise _error(
                    f"MLflow has no run {self._id} in {store} ({files.first_line(error)}); set MLFLOW_TRACKING_URI="
                    f"{notes.get('store')}, or remove {path} to begin a new one"
                ) from error
            self._client.update_run(self._id, status="RUNNING")
            steps = [metric.step for name in had for metric in self._client.get_metric_history(self._id, name)]
            self.last_step = max(steps, default=0)
            return
        self._id = self._client.create_run(_experiment(self._client), run_name=str(run.workdir)).info.run_id
        self.last_step = 0
        _write_notes(path, {"run_id": self._id, "store": store})
        fields = [
            mlflow.entities.Param(name, str(value)[:LONGEST_VALUE])
            for name, value in flatten_dict(run.config, sep=".").items()
        ]
        for at in range(0, len(fields), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=fields[at : at + PARAMETERS_AT_ONCE])

    def write(self, step: int, numbers: Numbers) -> None:
        """Implements `MetricWriter`."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)
        self.last_step = step

    def close(self, *, finished: bool) -> None:
        """Implements `MetricWriter`."""
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")


WRITERS: dict[str, Callable[[RunInfo], MetricWriter]]
WRITERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}  # by their names in `log.writers`
EXTRAS = ("wandb", "mlflow")  # need an optional package; package and extra have the name of the writer

CHOICES = f"must name some of {', '.join(WRITERS)}, separated by commas, or be empty for metrics.jsonl alone"


def names(value: str) -> list[str]:
    """Returns the writers in a value of `log.writers`, each once."""
    return list(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


def are_known_writers(value: str) -> bool:
    """Returns whether `log.writers` may have this value."""
    return set(names(value)) <= WRITERS.keys()


def validate_writers(value: str) -> None:
    """Checks that the packages of the writers in a value of `log.writers` are installed."""
    for name in names(value):
        # A folder of that name, such as the one that Weights & Biases creates, looks like a package without a file.
        if name in EXTRAS and not is_installed(name):
            remedy = f"{install_command(name)}, or remove it from the field"
            raise _error(f"the package {name} is not installed; {remedy}")


def _error(problem: str) -> MissingExtraError:
    return MissingExtraError(f"config.log.writers: {problem}", field="config.log.writers")


def open_writers(value: str, run: RunInfo) -> dict[str, MetricWriter]:
    """Starts the writers in a value of `log.writers` and returns them by name; if one fails, the others are closed."""
    validate_writers(value)
    writers: dict[str, MetricWriter] = {}
    for name in names(value):
        try:
            writers[name] = WRITERS[name](run)
        except Exception as error:  # of many types: no account, no network, a store of another version
            for other in writers.values():
                with contextlib.suppress(Exception):
                    other.close(finished=False)
            if isinstance(error, MissingExtraError) or name not in EXTRAS:
                raise
            remedy = "set it up, or remove it from the field: metrics.jsonl has the same numbers"
            raise _error(f"{name} does not start ({files.first_line(error)}); {remedy}") from error
    return writers


def _experiment(client: Any) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return client.create_experiment(name)
        except Exception:
            # Another run may have created it in the meantime.
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    return found.experiment_id


def _read_notes(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(files.read_json(path))
    except (OSError, ValueError, TypeError):
        raise MissingExtraError(
            f"{path}: the file is damaged, so that the run in the tracking service is unknown; remove it to begin a "
            "new one",
            field=str(path),
        ) from None


def _write_notes(path: pathlib.Path, content: dict[str, Any]) -> None:
    files.write_bytes(path, f"{json.dumps(content)}\n".encode())


class MetricLog:
    """A log of metrics by step: lines of metrics.jsonl, also passed on to writers. A context manager.

    When a run is resumed, records after `resumed_step`, or of epochs after `resumed_epoch`, are removed, since these
    steps are repeated. A writer gets no step twice, and first gets the remaining records that it lacks: it may be new,
    or a session may have been killed between the line and the writer. A writer that fails during training is reported
    once, by `warn`, and disabled; metrics.jsonl is always complete.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        resumed_step: int = 0,
        resumed_epoch: int = 0,
        *,
        writers: str = "tensorboard",
        config: dict[str, Any] | None = None,
        warn: Callable[[str], None] = print,
    ):
        self._path = workdir / "metrics.jsonl"
        self._warn = warn
        kept = _truncate(self._path, resumed_step, resumed_epoch)
        last_step = max((record["step"] for record in kept), default=0)
        run = RunInfo(workdir, config or {}, resumed_step > 0, last_step)
        self._writers = open_writers(writers, run)
        self._failed: list[MetricWriter] = []
        self._file = self._path.open("a", encoding="utf-8")
        for record in kept:
            self._pass_on(record["step"], {name: value for name, value in record.items() if name != "step"})

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._file.close()
        for name, writer in self._writers.items():
            try:
                writer.close(finished=kind is None)
            except Exception as error:
                self._warn(_failure(name, error))
        for writer in self._failed:
            with contextlib.suppress(Exception):
                writer.close(finished=False)

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Appends one record, in a whole line, and passes its numbers on to the writers."""
        self._file.write(json.dumps({"step": step} | record) + "\n")
        self._file.flush()
        self._pass_on(step, record)

    def _pass_on(self, step: int, record: dict[str, Any]) -> None:
        numbers: Numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        for name, writer in list(self._writers.items()):
            if step <= writer.last_step:
                continue
            try:
                writer.write(step, numbers)
            except Exception as error:  # training goes on without this writer
                self._failed.append(self._writers.pop(name))
                self._warn(_failure(name, error))


def _failure(name: str, error: Exception) -> str:
    return (
        f"{name} failed ({type(error).__name__}: {error}) and is disabled for this session; training goes on, and "
        "metrics.jsonl is complete"
    )


def _truncate(path: pathlib.Path, last_step: int, last_epoch: int) -> list[dict[str, Any]]:
    """Removes the records of steps that will be repeated, and returns the other ones."""
    if not path.exists():
        return []
    kept, lines = [], []
    # Anything but a file, such as a pipe, which would wait for its writer, is replaced.
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            # By epoch too: a run that was stopped after the last step of an epoch records that epoch only later.
            if record["step"] <= last_step and record.get("epoch", 0) <= last_epoch:
                kept.append(record)
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # a line cut short when the run was killed
    files.write_bytes(path, "".join(lines).encode())
    return kept
