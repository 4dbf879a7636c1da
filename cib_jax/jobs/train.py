"""The main job: train an encoder without labels, then measure it."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
from jax.sharding import Mesh
from jaxtyping import Float32

from cib_jax.config import checking, from_config
from cib_jax.data import loader
from cib_jax.data.images import DataError
from cib_jax.devices import parallel, processes
from cib_jax.errors import Refusal
from cib_jax.hashing.restoring import check_fingerprint, restore_best
from cib_jax.jobs import evaluate, features, ownership, preemption, progress, setting, teaching, validation
from cib_jax.jobs import workdir as workdir_lib
from cib_jax.jobs.ownership import Owned
from cib_jax.jobs.presenting import say
from cib_jax.jobs.setting import Setting
from cib_jax.objective import OBJECTIVES
from cib_jax.training import accumulation, feed, loop, writers
from cib_jax.training.checkpoint import Checkpoints, Progress
from cib_jax.training.feed import Feed
from cib_jax.training.logging import MetricLog
from cib_jax.training.state import TrainState, create_train_state


class TrainingError(Refusal):
    """Training broke down; the message says where, and what is left."""


def train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path | str | None = None,
    *,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Trains under `config` in `workdir` and measures the result; returns what results.json holds.

    A workdir that holds an unfinished run of the same config is taken up where its last checkpoint left it, and comes
    to the same parameters as if it had never stopped. A finished one is not touched.

    Args:
      config: see configs/default.py.
      workdir: the run's folder; None makes a new one under runs/.
      console: where to report.

    Raises:
      ConfigError, DataError, WeightsError, WorkdirError, PlaceError, CheckpointError: refused, before anything heavy
        starts.
      DevicesError: there are fewer devices than `config.devices`, or a batch cannot be spread over them.
      WriterError: a writer of `config.log.writers` is not installed or cannot start.
      PartsError: what a device holds of a batch cannot be cut into parts of `config.micro_batch`.
      TrainingError: the loss became NaN or infinite.
      WorkdirError: another run has taken over its checkpoints.
      Preempted: SIGTERM asked it to stop, and it is saved; the same call goes on.

    Several processes that were joined (`processes.join`) share the work; the first writes and reports.
    """
    with processes.agreed():
        checking.check(config)
        over = parallel.mesh(config.devices, config.batch_size)
        accumulation.check(config.micro_batch, config.batch_size // parallel.size(over))
        writers.check_installed(config.log.writers)
    console = (console or rich.console.Console()) if processes.first() else rich.console.Console(quiet=True)
    workdir = pathlib.Path(processes.from_first(str(workdir or workdir_lib.default_name(config))))
    with workdir_lib.claim(workdir):
        with processes.agreed():
            ownership.look(workdir, config)
        ownership.check_seen(workdir, config)
        with processes.agreed():
            workdir_lib.check_owner(workdir, config)
        if results := _finished(workdir, config):
            say(
                console,
                f"{workdir} holds a finished run of this config; --mode=evaluate --workdir={workdir} measures it again",
            )
            return results
        # What the first process downloads, decodes and keeps is there for the others.
        run = processes.first_then_others(lambda: setting.prepare(config, workdir, console))
        setting.check_alike(run)
        if processes.first():
            # Only now: a config that was refused has claimed nothing.
            workdir_lib.write_json(workdir / "config.json", config.to_dict())
        splits = run.splits
        network = f"{config.backbone} at {run.encoder.image_size} px" if run.encoder.image_size else "no network"
        say(
            console,
            f"{config.data.name}: {len(splits.train):,} training images, {len(splits.query):,} queries, "
            f"{len(splits.database):,} in the database; {network}, "
            f"{config.bits} bits, {config.objective}; in {workdir}",
        )
        say(console, evaluate.protocol_in_words(run))
        if over:
            several = f"{jax.process_count()} processes with " if processes.several() else ""
            say(console, f"{several}{over.size} devices share each batch")
        bank_seconds = _train(run, over)
        params, now, _ = restore_best(workdir, run.initial, config)
        return evaluate.measure(run, params, now, bank_seconds)


def _finished(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> dict[str, Any] | None:
    """Returns the results of a run that needs nothing more, None for one that does."""
    path = workdir / "results.json"
    pictured = not config.report.write or (workdir / "report" / "index.html").exists()
    # As the first process sees it: it may be at work on them already while another looks.
    if processes.from_first("yes" if path.exists() and pictured else "no") == "no":
        return None
    return workdir_lib.read_json(path)


def _train(run: Setting, over: Mesh | None) -> float:
    """Trains to the end, or goes on to it, leaving checkpoints; returns the seconds that the view bank took."""
    config = run.config
    state, now = create_train_state(run.initial, from_config.optimiser(config)), Progress()
    state = parallel.everywhere(state, over)
    extra: dict[str, Any] = {
        "config": config.to_dict(),
        "backbone_fingerprint": run.fingerprint,
        "bank_seconds": 0.0,
        "data": setting.known_data(run),
        "standard": run.standard.to_lists() if run.standard else None,
    }
    with processes.agreed():
        owned = ownership.take(run.workdir, config)
    with Checkpoints(owned.directory) as checkpoints:
        if checkpoints.latest_step is not None:
            untrained = state
            state, now, kept = checkpoints.restore_newest(state, _told_by(run))
            if checkpoints.without_best(state, now, _told_by(run)):
                state, now = untrained, Progress()
            else:
                extra = kept
        if checkpoints.latest_step is None:
            # Saved untrained, so that a run which breaks down at once still has a last good checkpoint.
            checkpoints.save(state, now, extra)
        else:
            with processes.agreed():
                check_fingerprint(run.fingerprint, extra, run.workdir)
                if changed := setting.changed_data(run, extra):
                    raise DataError(
                        f"config.data.dir: {changed}, so it cannot go on to the same result; put the data back, or "
                        "train again in another --workdir"
                    )
            say(run.console, f"Going on after {_place(now, config).rstrip(',')}")
        if not now.finished:
            with _log(run, now) as log:
                coordinates = _taught(run, over)
                fed, bank_seconds = _feed(run, over, coordinates)
                extra = extra | {"bank_seconds": bank_seconds}
                _loop(run, state, now, fed, log, owned, checkpoints, extra)
        return float(extra["bank_seconds"])


def _taught(run: Setting, over: Mesh | None) -> Float32[np.ndarray, "images dimensions"] | None:
    """Returns what a run's teacher says of the training images, once it is trained; None for a run without one."""
    if not OBJECTIVES[run.config.objective].taught:
        return None
    teacher = teaching.setting_of(run)
    found = teaching.kept(teacher)
    if not processes.all_of(found is not None):
        if processes.first():
            teacher.workdir.mkdir(exist_ok=True)
            workdir_lib.write_json(teacher.workdir / "config.json", teacher.config.to_dict())
        _told_by(run)(f"First a teacher of {teacher.config.epochs} epochs, in {teacher.workdir}")
        _train(teacher, over)
        # By all together, as checkpoints are opened; then by one alone, whose array the others read.
        params, _, _ = restore_best(teacher.workdir, teacher.initial, teacher.config)
        found = processes.first_then_others(
            lambda: teaching.coordinates(teacher, params) if processes.first() else teaching.kept(teacher)
        )
        _told_by(run)("Now the codes, taught by it")
    return found


def _place(now: Progress, config: ml_collections.ConfigDict) -> str:
    if now.steps_of_epoch:
        return f"step {now.step}, in epoch {now.epoch + 1} of {config.epochs},"
    return f"epoch {now.epoch} of {config.epochs}, step {now.step}"


def _told_by(run: Setting) -> Callable[[str], None]:
    return lambda words: say(run.console, words)


@contextlib.contextmanager
def _log(run: Setting, now: Progress) -> Iterator[MetricLog | None]:
    """Yields what the first process writes down, None in others; opened before the heavy part, since it may refuse."""
    with contextlib.ExitStack() as held:
        log = None
        with processes.agreed():
            if processes.first():
                fields = {"writers": run.config.log.writers, "config": run.config.to_dict(), "tell": _told_by(run)}
                log = held.enter_context(MetricLog(run.workdir, now.step, now.epoch, **fields))
        yield log


def _loop(
    run: Setting,
    state: TrainState,
    now: Progress,
    fed: Feed,
    log: MetricLog | None,
    owned: Owned,
    checkpoints: Checkpoints,
    extra: dict[str, Any],
) -> None:
    """Trains to the end, with a bar, the log and checkpoints."""
    config = run.config
    images = config.epochs * (len(run.splits.train) // config.batch_size) * config.batch_size
    with (
        progress.bar(run.console, "Training", images, now.step * config.batch_size) as moved,
        preemption.noted() as stop,
    ):

        def on_steps(steps: int, terms: dict[str, float]) -> None:
            moved(
                steps * config.batch_size, " ".join(f"{name} {terms[name]:.4f}" for name in ("loss", "contrast", "kl"))
            )

        def on_epoch(state: TrainState, report: loop.EpochReport) -> None:
            at = report.progress
            record: dict[str, Any] = {"epoch": at.epoch, **report.terms, "images_per_second": report.images_per_second}
            if report.validation_map is not None:
                record["validation_map"] = report.validation_map
                say(run.console, f"Epoch {at.epoch}: validation MAP {report.validation_map:.4f}")
            if log is not None:
                log.write(at.step, record)
            due = at.epoch % config.train.checkpoint_every == 0
            if due or at.finished or report.validation_map is not None:
                owned.check()
                checkpoints.save(state, at, extra)

        try:
            state, now = loop.run(
                state,
                now,
                steps=fed.steps,
                epoch_chunks=fed.epoch_chunks,
                key=from_config.key(config, "steps"),
                epochs=config.epochs,
                batch_size=config.batch_size,
                validate=validation.validator(run),
                validate_every=config.train.validate_every,
                patience=config.train.patience,
                on_steps=on_steps,
                on_epoch=on_epoch,
                stop=stop,
            )
        except loop.NonFiniteLossError as error:
            checkpoints.wait()
            raise TrainingError(
                f"{error}; the last good checkpoint is {checkpoints.directory / str(checkpoints.latest_step)}; train "
                "again in another --workdir with a lower config.learning_rate or a higher config.temperature"
            ) from None
        if not now.finished:
            owned.check()
            checkpoints.save(state, now, extra)
            checkpoints.wait()
            raise preemption.Preempted(f"{_place(now, config)} is saved in {checkpoints.directory}")


def _feed(
    run: Setting, over: Mesh | None, coordinates: Float32[np.ndarray, "images dimensions"] | None
) -> tuple[Feed, float]:
    """Returns what feeds the steps, and the seconds that the view bank took (0 without one)."""
    config, images = run.config, run.splits.train
    order: dict[str, Any] = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "coordinates": coordinates,
        "mesh": over,
    }
    method = {
        "encoder": run.encoder,
        "optimiser": from_config.optimiser(config),
        "objective": config.objective,
        "temperature": config.temperature,
        "beta": config.beta,
        "stochastic": config.binary == "stochastic",
        "sharpness": config.sharpness,
    }
    if config.train.views:
        bank, seconds = features.bank(run)
        return feed.from_bank(bank, **order, method=method), seconds
    method |= {"augment": config.augment, "micro_batch": config.micro_batch}
    stored_size = config.data.stored_size
    if loader.size_in_bytes(images.images, stored_size=stored_size) <= config.data.resident_mb * 2**20:
        resident = jnp.asarray(loader.materialise(images.images, stored_size=stored_size))
        return feed.from_device(resident, run.frozen, **order, method=method), 0.0
    return feed.from_stream(images.images, run.frozen, **order, stored_size=stored_size, method=method), 0.0
