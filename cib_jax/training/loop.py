"""The loop over epochs: steps, checks, validation, early stopping. It touches no file; `on_epoch` may."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from cib_jax.training.checkpoint import Progress
from cib_jax.training.state import TrainState

CHECK_EVERY = 32
"""Steps between looks at the loss: each look waits for the device."""

Step = Callable[[TrainState, Any, PRNGKeyArray], tuple[TrainState, dict[str, Float[Array, ""]]]]


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
    step: Step,
    epoch_batches: Callable[[int], Iterable[Any]],
    key: PRNGKeyArray,
    epochs: int,
    batch_size: int,
    validate: Callable[[TrainState], float] | None = None,
    validate_every: int = 20,
    patience: int = 6,
    on_steps: Callable[[int, dict[str, float]], None] = lambda steps, terms: None,
    on_epoch: Callable[[TrainState, EpochReport], None] = lambda state, report: None,
) -> tuple[TrainState, Progress]:
    """Trains from `progress` to the end and returns the last state.

    A function of its arguments alone: step s uses `key` folded with s, epoch e the batches `epoch_batches(e)`, so a run
    cut in two anywhere between epochs comes to the same bits as one that was not.

    Args:
      state: to start from; a step may donate it.
      progress: how far `state` has come.
      step: a jitted step, (state, batch, key) → (state, terms).
      epoch_batches: an epoch's batches.
      key: the root key of all steps.
      epochs: how many in all.
      batch_size: images per step, for the rate.
      validate: gives the validation MAP of a state; None: no validation and no early stopping.
      validate_every: epochs between validations.
      patience: validations without a better MAP after which training stops.
      on_steps: told now and then of the steps done since, and of the terms of the last.
      on_epoch: told of every epoch's end; the state it gets is only good until it returns.

    Raises:
      NonFiniteLossError: a term became NaN or infinite.
    """
    while not progress.finished and progress.epoch < epochs:
        begun = time.perf_counter()
        first_step = progress.step
        waiting: list[dict[str, Array]] = []
        sums: dict[str, float] = {}
        done = first_step

        def look(waiting: list[dict[str, Array]], done: int, sums: dict[str, float]) -> None:
            terms = _checked(waiting, done - len(waiting))
            for name in terms[-1]:
                sums[name] = sums.get(name, 0.0) + math.fsum(one[name] for one in terms)
            on_steps(len(terms), terms[-1])

        for batch in epoch_batches(progress.epoch):
            state, terms = step(state, batch, jax.random.fold_in(key, done))
            waiting.append(terms)
            done += 1
            if len(waiting) == CHECK_EVERY:
                look(waiting, done, sums)
                waiting = []
        if waiting:
            look(waiting, done, sums)
        seconds = time.perf_counter() - begun
        steps = done - first_step
        progress = dataclasses.replace(
            progress,
            epoch=progress.epoch + 1,
            step=done,
            seconds=progress.seconds + seconds,
            finished=progress.epoch + 1 == epochs,
        )
        validation_map = None
        if validate is not None and (progress.epoch % validate_every == 0 or progress.finished):
            validation_map = validate(state)
            progress = _judged(progress, validation_map, patience)
        report = EpochReport(
            progress,
            {name: total / steps for name, total in sums.items()},
            steps * batch_size / seconds,
            validation_map,
        )
        on_epoch(state, report)
    return state, progress


def _checked(terms: list[dict[str, Array]], first_step: int) -> list[dict[str, float]]:
    fetched = [{name: float(value) for name, value in one.items()} for one in jax.device_get(terms)]
    for offset, one in enumerate(fetched):
        if not all(math.isfinite(value) for value in one.values()):
            told = ", ".join(f"{name} {value:g}" for name, value in one.items())
            raise NonFiniteLossError(f"step {first_step + offset + 1}: the loss is not finite ({told})")
    return fetched


def _judged(progress: Progress, validation_map: float, patience: int) -> Progress:
    if validation_map > progress.best_map:
        return dataclasses.replace(progress, best_map=validation_map, best_step=progress.step, bad_validations=0)
    bad = progress.bad_validations + 1
    return dataclasses.replace(progress, bad_validations=bad, finished=progress.finished or bad >= patience)
