"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, each behind one interface."""

import contextlib
import importlib.util
import json
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from cib_jax import files
from cib_jax.errors import MissingExtraError

# training.writers: Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, each behind one interface.


PROJECT = "cib_jax"
"""Under which runs stand together elsewhere, where the environment names nothing else."""


AT_ONCE, LONGEST = 100, 6000
"""Parameters that MLflow takes at a time, and letters of one."""


FLUSHED_AFTER = 30.0
"""Seconds after which W&B has surely written down what it was given; it does so every 15, and at the end."""


class Run(NamedTuple):
    """A run whose numbers are written."""

    workdir: pathlib.Path
    config: dict[str, Any]
    """Its fields, in groups."""
    goes_on: bool
    """Whether it takes up an earlier session's checkpoint; else what that session began elsewhere is left as it is."""
    last_step: int
    """Of the records that metrics.jsonl kept of earlier sessions; 0 without any."""


class MetricWriter(Protocol):
    """What takes numbers by step."""

    last_step: int
    """The last step that it has had; records up to it, which a resumed run may make again, must not come again."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Takes the numbers of a step, which is above `last_step`."""

    def close(self, *, finished: bool) -> None:
        """Ends the session; `finished` says whether training came to its end."""


class TensorBoard:
    """Events in tensorboard/ of the workdir; what a session wrote that is made again is marked as void."""

    def __init__(self, run: Run):
        import tensorboardX

        folder = run.workdir / "tensorboard"
        self.last_step = run.last_step if any(folder.glob("events.*")) else 0
        self._events = tensorboardX.SummaryWriter(str(folder), purge_step=self.last_step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """As in `MetricWriter`."""
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)
        self.last_step = step

    def close(self, *, finished: bool) -> None:
        """As in `MetricWriter`."""
        self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose history can only grow: wandb.json keeps its id and the last step safe there.

    What a session that was killed had given just before, a server tells. Offline it is given again: rather twice than
    never.

    Files lie in wandb/ of the workdir. WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline … count as they do elsewhere.
    """

    def __init__(self, run: Run):
        import wandb

        self._path = run.workdir / "wandb.json"
        kept = _kept(self._path) if run.goes_on else {}
        self._id = str(kept.get("id", secrets.token_hex(4)))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=self._id,
            name=os.environ.get("WANDB_NAME") or str(run.workdir),
            dir=str(run.workdir),
            config=run.config,
            resume="allow",
            reinit="create_new",  # else a run of the caller's own would be taken for this one
            settings=wandb.Settings(console="off"),  # the progress bar is no log
        )
        self._safe = self._run.step - 1 if self._run.resumed else int(kept.get("step", 0))
        self.last_step = self._safe
        self._given: list[tuple[float, int]] = []
        self._keep()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """As in `MetricWriter`."""
        self._run.log(numbers, step=step)
        self.last_step = step
        now = time.monotonic()
        self._given.append((now, step))
        while now - self._given[0][0] > FLUSHED_AFTER:
            self._safe = self._given.pop(0)[1]
        self._keep()

    def close(self, *, finished: bool) -> None:
        """As in `MetricWriter`."""
        self._run.finish(exit_code=0 if finished else 1)
        self._safe = self.last_step
        self._keep()

    def _keep(self) -> None:
        _keep(self._path, {"id": self._id, "step": self._safe})


class MLflow:
    """A run of MLflow, in the store that MLFLOW_TRACKING_URI names; mlflow.json keeps its id and the store."""

    def __init__(self, run: Run):
        import mlflow

        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        path, store = run.workdir / "mlflow.json", mlflow.get_tracking_uri()
        kept = _kept(path) if run.goes_on else {}
        self._id = str(kept.get("run_id", ""))
        if self._id:
            try:
                had = self._client.get_run(self._id).data.metrics
            except Exception as error:
                raise MissingExtraError(
                    f"config.log.writers: MLflow has no run {self._id} in {store} ({_first_line(error)}); set "
                    f"MLFLOW_TRACKING_URI={kept.get('store')}, or remove {path} to begin a new one"
                ) from error
            self._client.update_run(self._id, status="RUNNING")
            steps = [metric.step for name in had for metric in self._client.get_metric_history(self._id, name)]
            self.last_step = max(steps, default=0)
            return
        self._id = self._client.create_run(_experiment(self._client), run_name=str(run.workdir)).info.run_id
        self.last_step = 0
        _keep(path, {"run_id": self._id, "store": store})
        fields = [mlflow.entities.Param(name, str(value)[:LONGEST]) for name, value in _flat(run.config)]
        for at in range(0, len(fields), AT_ONCE):
            self._client.log_batch(self._id, params=fields[at : at + AT_ONCE])

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """As in `MetricWriter`."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)
        self.last_step = step

    def close(self, *, finished: bool) -> None:
        """As in `MetricWriter`."""
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")


WRITERS: dict[str, Callable[[Run], MetricWriter]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
"""What `log.writers` may name."""

EXTRAS = ("wandb", "mlflow")
"""Writers that want a package more: it, and the extra that brings it, have the writer's name."""

CHOICES = f"must name some of {', '.join(WRITERS)} with commas between them, or be empty for metrics.jsonl alone"


def names(words: str) -> list[str]:
    """Returns the writers that `log.writers` names, each once."""
    return list(dict.fromkeys(name.strip() for name in words.split(",") if name.strip()))


def are_known_writers(words: str) -> bool:
    """Returns whether `log.writers` may have this value."""
    return set(names(words)) <= WRITERS.keys()


def validate_writers(words: str) -> None:
    """Checks that the packages of the writers that `log.writers` names are there.

    Raises:
      WriterError: one is not.
    """
    for name in names(words):
        # A folder of that name, as Weights & Biases leaves behind, looks like a package without a file.
        if name in EXTRAS and getattr(importlib.util.find_spec(name), "origin", None) is None:
            raise MissingExtraError(
                f"config.log.writers: the package {name} is not installed; pip install 'cib-jax[{name}]', or leave it "
                "out of the field"
            )


def open_writers(words: str, run: Run) -> dict[str, MetricWriter]:
    """Starts the writers that `log.writers` names, and returns them by name.

    Raises:
      WriterError: one does not start; those before it are closed.
    """
    validate_writers(words)
    found: dict[str, MetricWriter] = {}
    for name in names(words):
        try:
            found[name] = WRITERS[name](run)
        except Exception as error:  # of many kinds: no account, no network, a store of another version
            for other in found.values():
                with contextlib.suppress(Exception):
                    other.close(finished=False)
            if isinstance(error, MissingExtraError) or name not in EXTRAS:
                raise
            raise MissingExtraError(
                f"config.log.writers: {name} does not start ({_first_line(error)}); set it up, or leave it out of the "
                "field: metrics.jsonl has the same numbers"
            ) from error
    return found


def _experiment(client: Any) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return client.create_experiment(name)
        except Exception:
            # Another run may just have made it.
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    return found.experiment_id


def _flat(config: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def _kept(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        raise MissingExtraError(
            f"{path}: the file is damaged, so the run that was begun elsewhere is not known; remove it to begin a new "
            "one"
        ) from None


def _keep(path: pathlib.Path, content: dict[str, Any]) -> None:
    with files.replacing(path) as part:
        part.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# training.logging: What a run writes down while it trains: metrics.jsonl, always, and whatever writers are asked for.


class MetricLog:
    """Records of numbers by step, appended to `metrics.jsonl` and given to writers.

    A context manager. On a resumed run, records after `resumed_step`, or of epochs after `resumed_epoch`, are taken
    back first: they are about to be made again. A writer gets no step twice, and what it has missed of those that are
    kept: it may be new, or a session may have been killed between the two. One that fails while training goes on is
    told of and left; metrics.jsonl has everything.

    Args:
      workdir: the run's folder.
      resumed_step: the step after which training goes on; 0 for a new run.
      resumed_epoch: likewise, in whole epochs.
      writers: see `log.writers` in configs/default.py.
      config: the run's, in groups, for writers that show it.
      tell: is told once of each writer that fails.

    Raises:
      WriterError: a writer cannot start.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        resumed_step: int = 0,
        resumed_epoch: int = 0,
        *,
        writers: str = "tensorboard",
        config: dict[str, Any] | None = None,
        tell: Callable[[str], None] = print,
    ):
        self._path = workdir / "metrics.jsonl"
        self._tell = tell
        kept = _truncate(self._path, resumed_step, resumed_epoch)
        last_step = max((record["step"] for record in kept), default=0)
        run = Run(workdir, config or {}, resumed_step > 0, last_step)
        self._writers = open_writers(writers, run)
        self._failed: list[MetricWriter] = []
        self._file = self._path.open("a", encoding="utf-8")
        for record in kept:
            self._give(record["step"], {name: value for name, value in record.items() if name != "step"})

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._file.close()
        for name, writer in self._writers.items():
            try:
                writer.close(finished=kind is None)
            except Exception as error:
                self._tell(_told(name, error))
        for writer in self._failed:
            with contextlib.suppress(Exception):
                writer.close(finished=False)

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Appends one record, whole lines only, and gives its numbers to the writers."""
        self._file.write(json.dumps({"step": step} | record) + "\n")
        self._file.flush()
        self._give(step, record)

    def _give(self, step: int, record: dict[str, Any]) -> None:
        numbers: dict[str, float] = {name: value for name, value in record.items() if isinstance(value, int | float)}
        for name, writer in list(self._writers.items()):
            if step <= writer.last_step:
                continue
            try:
                writer.write(step, numbers)
            except Exception as error:  # hours of training are worth more than their picture elsewhere
                self._failed.append(self._writers.pop(name))
                self._tell(_told(name, error))


def _told(name: str, error: Exception) -> str:
    return (
        f"{name} failed ({type(error).__name__}: {error}) and gets no more of this session's numbers; training goes "
        "on, and metrics.jsonl has all of them"
    )


def _truncate(path: pathlib.Path, last_step: int, last_epoch: int) -> list[dict[str, Any]]:
    """Takes back what is about to be made again, and returns the records that stay."""
    if not path.exists():
        return []
    kept, lines = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            # An epoch whose last step is saved may have been told of, and may have to be told of again.
            if record["step"] <= last_step and record.get("epoch", 0) <= last_epoch:
                kept.append(record)
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a line cut short when the run was killed
    with files.replacing(path) as part:
        part.write_text("".join(lines), encoding="utf-8")
    return kept
