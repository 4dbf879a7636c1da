"""What a run writes down while it trains: metrics.jsonl, always, and whatever writers are asked for."""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

from cib_jax import atomic
from cib_jax.training import writers as writers_lib
from cib_jax.training.writers import MetricWriter


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
        run = writers_lib.Run(workdir, config or {}, resumed_step > 0, last_step)
        self._writers = writers_lib.opened(writers, run)
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
    with atomic.replacing(path) as part:
        part.write_text("".join(lines), encoding="utf-8")
    return kept
