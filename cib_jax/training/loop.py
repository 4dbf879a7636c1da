"""The loop over epochs: steps, checks, validation, early stopping. It touches no file; `on_epoch` may."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from cib_jax.training.train_step import Progress, TrainState

LOOK_EVERY = 32
"""Steps that are under way at most before their loss is looked at: a look waits for the device."""

Steps = Callable[[TrainState, Any, int, PRNGKeyArray], tuple[TrainState, dict[str, Float[Array, " steps"]]]]
"""A jitted program of some steps: (state, chunk, number of its first step, root key) → (state, each step's terms)."""

Chunks = Callable[[int, int], Iterable[Any]]
"""Gives the chunks of an epoch from one of its steps on, the first one of a chunk: (epoch, step) → chunks."""


class NonFiniteLossError(ArithmeticError):
    """A loss term became NaN or infinite; the message names the step and the terms."""


@dataclasses.dataclass(frozen=True)
class EpochReport:
    """What an epoch came to."""

    progress: Progress
    terms: dict[str, float]
    """Means over the epoch's steps."""
    images_per_second: float
    validation_map: float | None
    """None where this epoch had no validation."""


def run(
    state: TrainState,
    progress: Progress,
    *,
    steps: Steps,
    epoch_chunks: Chunks,
    key: PRNGKeyArray,
    epochs: int,
    batch_size: int,
    validate: Callable[[TrainState], float] | None = None,
    validate_every: int = 20,
    patience: int = 6,
    on_steps: Callable[[int, dict[str, float]], None] = lambda steps, terms: None,
    on_epoch: Callable[[TrainState, EpochReport], None] = lambda state, report: None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, Progress]:
    """Trains from `progress` to the end, or to where `stop` says so, and returns the last state.

    A function of its arguments alone: step s uses `key` folded with s, epoch e the chunks `epoch_chunks(e, 0)`, so a
    run cut in two anywhere between chunks comes to the same bits as one that was not. Steps are dispatched ahead and
    their terms read late: inside an epoch, the device never waits for the host.

    Args:
      state: to start from; it may be donated.
      progress: how far `state` has come.
      steps: takes the steps of one chunk.
      epoch_chunks: an epoch's chunks, from one of its steps on.
      key: the root key of all steps.
      epochs: how many in all.
      batch_size: images per step, for the rate.
      validate: gives the validation MAP of a state; None: no validation and no early stopping.
      validate_every: epochs between validations.
      patience: validations without a better MAP after which training stops.
      on_steps: told now and then of the steps done since, and of the terms of the last.
      on_epoch: told of every epoch's end; the state it gets is only good until it returns.
      stop: asked after every chunk.

    Raises:
      NonFiniteLossError: a term became NaN or infinite.
    """
    while not progress.finished and progress.epoch < epochs:
        begun = time.perf_counter()
        under_way: list[dict[str, Array]] = []
        sums = dict(progress.sums)
        done = seen = progress.step
        stopped = False
        for chunk in epoch_chunks(progress.epoch, progress.steps_of_epoch):
            state, terms = steps(state, chunk, done, key)
            under_way.append(terms)
            done += _count(terms)
            if stopped := stop():
                break
            if done - seen > LOOK_EVERY and len(under_way) > 1:
                # The newer half is left running while the older one is looked at.
                half = len(under_way) // 2
                seen += _look(under_way[:half], seen, sums, on_steps)
                under_way = under_way[half:]
        if under_way:
            _look(under_way, seen, sums, on_steps)
        seconds = time.perf_counter() - begun
        rate = (done - progress.step) * batch_size / seconds
        taken = progress.steps_of_epoch + done - progress.step
        progress = dataclasses.replace(progress, step=done, seconds=progress.seconds + seconds)
        if stopped:
            return state, dataclasses.replace(progress, steps_of_epoch=taken, sums=sums)
        progress = dataclasses.replace(
            progress,
            epoch=progress.epoch + 1,
            steps_of_epoch=0,
            sums={},
            finished=progress.epoch + 1 == epochs,
        )
        validation_map = None
        if validate is not None and (progress.epoch % validate_every == 0 or progress.finished):
            validation_map = validate(state)
            progress = _judged(progress, validation_map, patience)
        report = EpochReport(
            progress,
            {name: total / taken for name, total in sums.items()},
            rate,
            validation_map,
        )
        on_epoch(state, report)
    return state, progress


def _count(terms: dict[str, Float[Array, " steps"]]) -> int:
    return len(next(iter(terms.values())))


def _look(
    under_way: list[dict[str, Float[Array, " steps"]]],
    first_step: int,
    sums: dict[str, float],
    on_steps: Callable[[int, dict[str, float]], None],
) -> int:
    """Waits for the terms of some chunks, checks them, adds them to `sums`; returns the number of steps."""
    fetched = jax.device_get(under_way)
    terms = {name: np.concatenate([chunk[name] for chunk in fetched]).astype(np.float64) for name in fetched[0]}
    finite = np.atleast_1d(np.isfinite(np.stack(list(terms.values()))).all(axis=0))
    if not finite.all():
        bad = int(np.argmin(finite))
        told = ", ".join(f"{name} {values[bad]:g}" for name, values in terms.items())
        raise NonFiniteLossError(f"step {first_step + bad + 1}: the loss is not finite ({told})")
    for name, values in terms.items():
        sums[name] = sums.get(name, 0.0) + math.fsum(values)
    on_steps(len(finite), {name: float(values[-1]) for name, values in terms.items()})
    return len(finite)


def _judged(progress: Progress, validation_map: float, patience: int) -> Progress:
    if validation_map > progress.best_map:
        return dataclasses.replace(progress, best_map=validation_map, best_step=progress.step, bad_validations=0)
    bad = progress.bad_validations + 1
    return dataclasses.replace(progress, bad_validations=bad, finished=progress.finished or bad >= patience)
