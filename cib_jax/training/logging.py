"""What a run writes down while it trains: metrics.jsonl and TensorBoard events."""

import json
import pathlib
from typing import Any

import tensorboardX

from cib_jax import atomic


class MetricLog:
    """Records of numbers by step, appended to `metrics.jsonl` and to TensorBoard events under `tensorboard/`.

    A context manager. On a resumed run, records after `resumed_step`, or of epochs after `resumed_epoch`, are taken
    back first: they are about to be made again.
    """

    def __init__(self, workdir: pathlib.Path, resumed_step: int = 0, resumed_epoch: int = 0):
        self._path = workdir / "metrics.jsonl"
        _truncate(self._path, resumed_step, resumed_epoch)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1)

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._events.close()

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Appends one record, whole lines only, and its numbers to TensorBoard."""
        self._file.write(json.dumps({"step": step} | record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, value, step)


def _truncate(path: pathlib.Path, last_step: int, last_epoch: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            # An epoch whose last step is saved may have been told of, and may have to be told of again.
            if record["step"] <= last_step and record.get("epoch", 0) <= last_epoch:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short when the run was killed
    with atomic.replacing(path) as part:
        part.write_text("".join(kept), encoding="utf-8")
