"""The main job: train an encoder without labels, then measure it."""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import rich.console

from cib_jax import config as config_lib
from cib_jax import from_config
from cib_jax.data import loader
from cib_jax.data.splits import Splits
from cib_jax.encoder import Encoder, Params
from cib_jax.jobs import evaluate, validation
from cib_jax.jobs import progress as progress_lib
from cib_jax.jobs import workdir as workdir_lib
from cib_jax.training import loop, view_bank
from cib_jax.training.checkpoint import Checkpoints, Progress
from cib_jax.training.logging import MetricLog
from cib_jax.training.state import TrainState, create_train_state
from cib_jax.training.step import train_step, train_step_on_features


class TrainingError(ArithmeticError):
    """Training broke down; the message says where, and what is left."""


def train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path | str | None = None,
    *,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Trains under `config` in `workdir` and measures the result; returns what results.json holds.

    A workdir that holds an unfinished run of the same config is taken up where its last checkpoint left it, and comes to
    the same parameters as if it had never stopped. A finished one is not touched.

    Args:
      config: see configs/default.py.
      workdir: the run's folder; None makes a new one under runs/.
      console: where to report.

    Raises:
      ConfigError, DataError, WeightsError, WorkdirError, CheckpointError: refused, before anything heavy starts.
      TrainingError: the loss became NaN or infinite.
    """
    config_lib.check(config)
    workdir, console = pathlib.Path(workdir or workdir_lib.default_name(config)), console or rich.console.Console()
    with workdir_lib.claim(workdir, config):
        if (workdir / "results.json").exists():
            console.print(
                f"{workdir} holds a finished run of this config; measure it again with --mode=evaluate --workdir={workdir}",
                soft_wrap=True,
            )
            return json.loads((workdir / "results.json").read_text(encoding="utf-8"))
        splits = from_config.draw_splits(config)
        encoder, params, frozen, fingerprint = from_config.encoder(config)
        console.print(
            f"{config.data.name}: {len(splits.train):,} training images, {len(splits.query):,} queries, "
            f"{len(splits.database):,} in the database; {config.backbone} at {encoder.image_size} px, {config.bits} bits, "
            f"{config.objective}; in {workdir}",
            soft_wrap=True,
            highlight=False,
        )
        run = functools.partial(_train, config, workdir, splits, encoder, params, frozen, fingerprint, console)
        params, progress, bank_seconds = run()
        return evaluate.measure(config, workdir, splits, encoder, params, frozen, progress, bank_seconds, console)


def _train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    splits: Splits,
    encoder: Encoder,
    params: Params,
    frozen: Params,
    fingerprint: str,
    console: rich.console.Console,
) -> tuple[Params, Progress, float]:
    optimiser = from_config.optimiser(config)
    state = create_train_state(params, optimiser)
    progress, extra = Progress(), {"config": config.to_dict(), "backbone_fingerprint": fingerprint, "bank_seconds": 0.0}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        if checkpoints.latest_step is not None:
            state, progress, extra = checkpoints.restore(state)
            console.print(f"Resuming after epoch {progress.epoch} of {config.epochs}, step {progress.step}")
        elif progress.epoch == 0:
            # An untrained checkpoint, so that a run which breaks down at once still has a last good one.
            checkpoints.save(state, progress, extra)
        if not progress.finished:
            step, epoch_batches, bank_seconds = _prepare(config, splits, encoder, frozen, optimiser, console)
            extra = extra | {"bank_seconds": bank_seconds}
            state, progress = _loop(
                config, workdir, splits, encoder, frozen, state, progress, step, epoch_batches, checkpoints, extra, console
            )
        checkpoints.wait()
        if progress.best_step and progress.best_step != progress.step:
            state, _, _ = checkpoints.restore(state, progress.best_step)
        return state.params, progress, float(extra["bank_seconds"])


def _loop(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    splits: Splits,
    encoder: Encoder,
    frozen: Params,
    state: TrainState,
    progress: Progress,
    step: loop.Step,
    epoch_batches: Callable[[int], Iterable[Any]],
    checkpoints: Checkpoints,
    extra: dict[str, Any],
    console: rich.console.Console,
) -> tuple[TrainState, Progress]:
    validate = None
    if splits.validation is not None:
        validate = validation.validator(config, splits.validation, encoder, frozen)
    images = config.epochs * (len(splits.train) // config.batch_size) * config.batch_size
    with (
        MetricLog(workdir, progress.step) as log,
        progress_lib.bar(console, "Training", images, progress.step * config.batch_size) as moved,
    ):

        def on_steps(steps: int, terms: dict[str, float]) -> None:
            moved(steps * config.batch_size, " ".join(f"{name} {value:.4f}" for name, value in terms.items()))

        def on_epoch(state: TrainState, report: loop.EpochReport) -> None:
            now = report.progress
            record = {"epoch": now.epoch, **report.terms, "images_per_second": report.images_per_second}
            if report.validation_map is not None:
                record["validation_map"] = report.validation_map
                console.print(f"Epoch {now.epoch}: validation MAP@{config.k} {report.validation_map:.4f}")
            log.write(now.step, record)
            due = now.epoch % config.train.checkpoint_every == 0
            if due or now.finished or report.validation_map is not None:
                checkpoints.save(state, now, extra)

        try:
            return loop.run(
                state,
                progress,
                step=step,
                epoch_batches=epoch_batches,
                key=from_config.key(config, "steps"),
                epochs=config.epochs,
                batch_size=config.batch_size,
                validate=validate,
                validate_every=config.train.validate_every,
                patience=config.train.patience,
                on_steps=on_steps,
                on_epoch=on_epoch,
            )
        except loop.NonFiniteLossError as error:
            checkpoints.wait()
            raise TrainingError(
                f"{error}; the last good checkpoint is {checkpoints.directory / str(checkpoints.latest_step)}; train again "
                "in another --workdir with a lower config.learning_rate or a higher config.temperature"
            ) from None


def _prepare(
    config: ml_collections.ConfigDict,
    splits: Splits,
    encoder: Encoder,
    frozen: Params,
    optimiser: optax.GradientTransformation,
    console: rich.console.Console,
) -> tuple[loop.Step, Callable[[int], Iterable[Any]], float]:
    """Returns the jitted step, what gives it an epoch's batches, and the seconds that the view bank took."""
    method = {
        "encoder": encoder,
        "optimiser": optimiser,
        "objective": config.objective,
        "temperature": config.temperature,
        "beta": config.beta,
        "stochastic": config.binary == "stochastic",
    }
    images, stored_size = splits.train.images, config.data.stored_size
    count, size = len(images), config.batch_size

    def index_batches(epoch: int) -> Iterable[np.ndarray]:
        order = loader.epoch_order(config.seed, epoch, count)
        return (order[start : start + size] for start in range(0, count - size + 1, size))

    if config.train.views:
        begun = time.perf_counter()
        with progress_lib.bar(console, f"Bank of {config.train.views} views", count * config.train.views) as moved:
            bank = view_bank.build(
                from_config.key(config, "view bank"),
                encoder,
                frozen,
                lambda: evaluate.batches(config, splits.train),
                views=config.train.views,
                family=config.augment,
                on_images=lambda images: moved(images, ""),
            )

        def step_on_bank(state: TrainState, bank: jax.Array, indices: np.ndarray, key: jax.Array):
            features = view_bank.draw_pairs(jax.random.fold_in(key, 0), bank, indices)
            return train_step_on_features(state, *features, key, **method)

        return _bound(step_on_bank, bank), index_batches, time.perf_counter() - begun

    step_on_images = functools.partial(train_step, augment=config.augment, **method)
    if loader.size_in_bytes(images, stored_size=stored_size) <= config.data.resident_mb * 2**20:
        resident = jnp.asarray(loader.materialise(images, stored_size=stored_size))

        def step_on_resident(state: TrainState, held: tuple[Params, jax.Array], indices: np.ndarray, key: jax.Array):
            return step_on_images(state, held[0], held[1][indices], key)

        return _bound(step_on_resident, (frozen, resident)), index_batches, 0.0

    def image_batches(epoch: int) -> Iterable[np.ndarray]:
        order = loader.epoch_order(config.seed, epoch, count)
        return loader.stream(images, order, size, stored_size=stored_size, drop_remainder=True)

    return _bound(step_on_images, frozen), image_batches, 0.0


def _bound(step: Callable[..., tuple[TrainState, dict[str, Any]]], held: Any) -> loop.Step:
    # What never changes is an argument of the program, not a constant inside it: a bank of gigabytes would be copied
    # into the executable.
    jitted = jax.jit(step, donate_argnums=0)
    return lambda state, batch, key: jitted(state, held, batch, key)
