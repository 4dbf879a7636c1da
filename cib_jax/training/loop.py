"""The loop over epochs: steps, checks of the loss, validation, early stopping. It touches no file; its hooks may."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from cib_jax.errors import ConfigError
from cib_jax.training.train_step import Progress, TrainState

FETCH_EVERY = 32  # the most steps that are dispatched before their loss is fetched, which waits for the device

StepTerms = dict[str, Float[Array, "_"]]  # each loss term at every step of a chunk


class Feed(NamedTuple):
    """What brings training data to the device: a compiled program of some steps, and the chunks of steps it takes."""

    steps: Callable[[TrainState, Any, int, PRNGKeyArray], tuple[TrainState, StepTerms]]
    """Function (state, chunk, number of its first step, root key) → (state, terms of each step)."""
    epoch_chunks: Callable[[int, int], Iterable[Any]]
    """Function (epoch, step of the epoch to begin with) → the remaining chunks of that epoch."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long training lasts (`epochs` at most), and in which portions."""

    epochs: int
    batch_size: int
    validate_every: int = 20  # epochs between validations
    patience: int = 6  # validations without a better score after which training stops
    partial_batch: bool = False  # whether an epoch ends with a smaller batch of the images that are left over

    def steps_per_epoch(self, images: int) -> int:
        """Returns the number of steps of an epoch over so many images."""
        steps, rest = divmod(images, self.batch_size)
        return steps + (self.partial_batch and rest > 0)

    def validate(self, images: int, devices: int, micro_batch: int = 0) -> None:
        """Raises ConfigError if the images that are left over cannot be a batch."""
        rest = images % self.batch_size
        if self.partial_batch and rest and (rest < 2 or rest % (devices * max(1, micro_batch))):
            allowed = "2 or more and a multiple of the number of devices, times micro_batch if that is not 0"
            raise ConfigError(
                f"partial_batch must be False where the images left over from batches are not {allowed}, got True "
                f"with {rest} of {images} images left over, batch_size {self.batch_size}, micro_batch "
                f"{micro_batch} and {devices} devices",
                field="partial_batch",
            )


@dataclasses.dataclass(frozen=True)
class EpochReport:
    """Result of one epoch: means of the loss terms over its steps, and the score of its validation, if any."""

    progress: Progress
    terms: dict[str, float]
    images_per_second: float
    score: float | None

    @property
    def validation_map(self) -> float | None:
        """Older name of `score`."""
        return self.score


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a caller does between steps and epochs: by default, nothing."""

    validate: Callable[[TrainState], float] | None = None
    """Computes the score of a state, larger is better; None trains without validation and without early stopping."""
    on_steps: Callable[[int, dict[str, float]], None] = lambda steps, terms: None
    """Called now and then with the number of steps done since the last call, and the terms of the last one."""
    on_epoch: Callable[[TrainState, EpochReport], None] = lambda state, report: None
    """Called after every epoch; the state is valid only during the call, since the next step donates it."""
    stop: Callable[[], bool] = lambda: False  # called after every chunk; True stops training there
    during_steps: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """Returns a context that the trainer enters for the loop alone: a progress bar, signal handlers."""


class NonFiniteLossError(ArithmeticError):
    """A loss term became NaN or infinite; the message names the step and the terms."""


def run(
    state: TrainState, progress: Progress, feed: Feed, *, key: PRNGKeyArray, schedule: Schedule, hooks: Hooks = Hooks()
) -> tuple[TrainState, Progress]:
    """Trains from `progress` to the end, or until `hooks.stop`, and returns the last state.

    A function of its arguments alone: step s uses `key` folded with s, and epoch e the chunks of
    `feed.epoch_chunks(e, 0)`. A run that was stopped after any chunk and resumed therefore ends with the same bits.
    Steps are dispatched ahead and their terms are fetched late: within an epoch, the device never waits for the host.
    The state may be donated.
    """
    while not progress.finished and progress.epoch < schedule.epochs:
        begun = time.perf_counter()
        pending: list[StepTerms] = []
        sums = dict(progress.sums)
        dispatched = fetched = progress.step
        stopped = False
        for chunk in feed.epoch_chunks(progress.epoch, progress.steps_of_epoch):
            state, terms = feed.steps(state, chunk, dispatched, key)
            pending.append(terms)
            dispatched += len(next(iter(terms.values())))
            if stopped := hooks.stop():
                break
            if dispatched - fetched > FETCH_EVERY and len(pending) > 1:
                # Only the older half is waited for: the device still has the newer one to compute.
                half = len(pending) // 2
                fetched += _fetch(pending[:half], fetched, sums, hooks)
                pending = pending[half:]
        if pending:
            _fetch(pending, fetched, sums, hooks)
        seconds = time.perf_counter() - begun
        images_per_second = (dispatched - progress.step) * schedule.batch_size / seconds
        steps_of_epoch = progress.steps_of_epoch + dispatched - progress.step
        progress = dataclasses.replace(progress, step=dispatched, seconds=progress.seconds + seconds)
        if stopped:
            return state, dataclasses.replace(progress, steps_of_epoch=steps_of_epoch, sums=sums)
        epoch = progress.epoch + 1
        progress = dataclasses.replace(
            progress, epoch=epoch, steps_of_epoch=0, sums={}, finished=epoch == schedule.epochs
        )
        score = None
        if hooks.validate is not None and (epoch % schedule.validate_every == 0 or progress.finished):
            score = hooks.validate(state)
            progress = _after_validation(progress, score, schedule.patience)
        means = {name: total / steps_of_epoch for name, total in sums.items()}
        hooks.on_epoch(state, EpochReport(progress, means, images_per_second, score))
    return state, progress


def _fetch(pending: list[StepTerms], first_step: int, sums: dict[str, float], hooks: Hooks) -> int:
    """Waits for the terms of some chunks, checks them and adds them to `sums`; returns the number of steps."""
    chunks = jax.device_get(pending)
    terms = {name: np.concatenate([chunk[name] for chunk in chunks]).astype(np.float64) for name in chunks[0]}
    finite = np.atleast_1d(np.isfinite(np.stack(list(terms.values()))).all(axis=0))
    if not finite.all():
        bad = int(np.argmin(finite))
        words = ", ".join(f"{name} {values[bad]:g}" for name, values in terms.items())
        raise NonFiniteLossError(f"step {first_step + bad + 1}: the loss is not finite ({words})")
    for name, values in terms.items():
        sums[name] = sums.get(name, 0.0) + math.fsum(values)
    hooks.on_steps(len(finite), {name: float(values[-1]) for name, values in terms.items()})
    return len(finite)


def _after_validation(progress: Progress, score: float, patience: int) -> Progress:
    if score > progress.best_score:
        return dataclasses.replace(progress, best_score=score, best_step=progress.step, bad_validations=0)
    bad = progress.bad_validations + 1
    return dataclasses.replace(progress, bad_validations=bad, finished=progress.finished or bad >= patience)
