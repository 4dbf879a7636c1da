"""Validation while training: the MAP of a held-out part, under parameters that keep changing."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
from jax.sharding import Mesh
from jaxtyping import Float, Float32, UInt8

from cib_jax import diffusion
from cib_jax.commands import evaluate
from cib_jax.config import build, schema
from cib_jax.console import print_message, progress_bar
from cib_jax.data import dataset
from cib_jax.data.dataset import ImageSet
from cib_jax.distributed import multihost, sharding
from cib_jax.errors import DataError, TrainingError
from cib_jax.inference.hasher import Hasher
from cib_jax.inference.serialization import restore_best, validate_fingerprint
from cib_jax.losses import OBJECTIVES
from cib_jax.models.encoder import Params
from cib_jax.retrieval import metrics
from cib_jax.runs import context, features
from cib_jax.runs.context import RunContext
from cib_jax.runs.workdir import (
    Owned,
    claim_workdir,
    default_name,
    find_owner,
    read_json,
    take_ownership,
    validate_owner,
    validate_owner_seen,
    write_array,
    write_json,
)
from cib_jax.training import checkpoint, grad_cache, input_pipeline, loop, metric_writers
from cib_jax.training.checkpoint import Checkpoints
from cib_jax.training.input_pipeline import Feed
from cib_jax.training.metric_writers import MetricLog
from cib_jax.training.train_step import Progress, TrainState, create_train_state

# jobs.validation: Validation while training: the MAP of a held-out part, under parameters that keep changing.


def validator(setting: RunContext) -> Callable[[TrainState], float] | None:
    """Returns a function of a state that gives its validation MAP@k, or None where nothing is held out.

    A frozen backbone's features are computed at the first validation and kept on the host: the head alone changes.
    """
    if setting.splits.validation is None:
        return None
    query, database = setting.splits.validation
    if query.labels is None or database.labels is None:
        raise AssertionError("draw_splits lets nothing validate without labels")
    labels = query.labels, database.labels
    kept: dict[str, list[Float[np.ndarray, "part features"]]] = {}

    def codes(params: Params, images: ImageSet, name: str) -> UInt8[np.ndarray, "n bytes"]:
        if not setting.features_stay:
            return features.codes(setting, params, images, f"Validation, {name}")
        if name not in kept:
            kept[name] = list(features.plain(setting, images, f"Validation, {name}", shared=True))
        mine = [features.codes_of_features(setting, params, part) for part in kept[name]]
        return features.joined(setting, len(images), mine)

    def validate(state: TrainState) -> float:
        params = sharding.to_local(state.params)
        found, searched = codes(params, query, "query"), codes(params, database, "database")
        k = setting.protocol.k or len(database)

        def of_queries(mine: slice) -> float:
            return metrics.mean_average_precision(found[mine], searched, labels[0][mine], labels[1], k)

        return multihost.mean_over_processes(of_queries, len(found))

    return validate


# jobs.teaching: The teacher of a run: a run of its own in the folder teacher/, and what it says of the training images.


FOLDER = "teacher"
COORDINATES = "coordinates.npy"


def teacher_context(run: RunContext) -> RunContext:
    """Returns the surroundings of a run's teacher: its data and backbone, another head and objective, no validation.

    Without validation, since labels would choose its checkpoint.
    """
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        own = build.teacher(config)
        config.update(own.method | {"bits": own.bits, "epochs": own.epochs or config.epochs})
        config.train.checkpoint_dir = checkpoint.within(config.train.checkpoint_dir, FOLDER)
    encoder, initial, frozen, _ = build.encoder(config, standard=run.standard)
    return dataclasses.replace(
        run,
        config=config,
        workdir=run.workdir / FOLDER,
        splits=dataclasses.replace(run.splits, validation=None),
        encoder=encoder,
        initial=initial,
        # The run's own, so that a large network is held once.
        frozen=run.frozen or frozen,
    )


def kept(teacher: RunContext) -> Float32[np.ndarray, "images dimensions"] | None:
    """Returns the coordinates that were computed earlier, None where there are none that can be read."""
    shape = (len(teacher.splits.train), teacher.config.teacher.dimensions)
    try:
        found = np.load(_path(teacher), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


def coordinates(teacher: RunContext, params: Params) -> Float32[np.ndarray, "images dimensions"]:
    """Returns the diffusion coordinates of the training images under a trained teacher, and keeps them.

    Raises:
      DiffusionError: it gives no embedding of some image.
    """
    embeddings = _embeddings(teacher, params)
    walk = build.teacher(teacher.config).walk
    with progress_bar(teacher.console, "Neighbors", len(embeddings)) as moved:
        found = diffusion.coordinates(embeddings, **walk, on_items=lambda count: moved(count, ""))
    write_array(_path(teacher), found)
    return found


def _path(teacher: RunContext) -> pathlib.Path:
    return teacher.workdir / COORDINATES


def _embeddings(teacher: RunContext, params: Params) -> Float32[np.ndarray, "images features"]:
    """Returns the teacher's logits of the unaugmented training images."""
    images, what = teacher.splits.train, "Encoding for the teacher"
    if teacher.features_stay:
        parts = features.plain(teacher, images, what)
        return np.concatenate([features.logits_of_features(teacher, params, part) for part in parts])
    hasher = Hasher(teacher.encoder, params, teacher.frozen, devices=sharding.mesh_size(teacher.mesh))
    size = min(teacher.config.encode_batch, len(images))
    with progress_bar(teacher.console, what, len(images)) as moved:
        return hasher.logits_of_batches(teacher.batches(images), lambda count: moved(count, ""), size=size)


# jobs.train: The main job: train an encoder without labels, then measure it.


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
    with multihost.shared_errors():
        schema.validate(config)
        over = sharding.make_mesh(config.devices, config.batch_size)
        grad_cache.validate_micro_batch(config.micro_batch, config.batch_size // sharding.mesh_size(over))
        metric_writers.validate_writers(config.log.writers)
    console = (console or rich.console.Console()) if multihost.is_first_process() else rich.console.Console(quiet=True)
    workdir = pathlib.Path(multihost.broadcast_text(str(workdir or default_name(config))))
    with claim_workdir(workdir):
        with multihost.shared_errors():
            find_owner(workdir, config)
        validate_owner_seen(workdir, config)
        with multihost.shared_errors():
            validate_owner(workdir, config)
        if results := _finished(workdir, config):
            print_message(
                console,
                f"{workdir} holds a finished run of this config; --mode=evaluate --workdir={workdir} measures it again",
            )
            return results
        # What the first process downloads, decodes and keeps is there for the others.
        run = multihost.run_first_then_others(lambda: context.prepare_run(config, workdir, console))
        context.validate_same_data(run)
        if multihost.is_first_process():
            # Only now: a config that was refused has claimed nothing.
            write_json(workdir / "config.json", config.to_dict())
        splits = run.splits
        network = f"{config.backbone} at {run.encoder.image_size} px" if run.encoder.image_size else "no network"
        print_message(
            console,
            f"{config.data.name}: {len(splits.train):,} training images, {len(splits.query):,} queries, "
            f"{len(splits.database):,} in the database; {network}, "
            f"{config.bits} bits, {config.objective}; in {workdir}",
        )
        print_message(console, evaluate.format_protocol(run))
        if over:
            several = f"{jax.process_count()} processes with " if multihost.is_distributed() else ""
            print_message(console, f"{several}{over.size} devices share each batch")
        bank_seconds = _train(run, over)
        params, now, _ = restore_best(workdir, run.initial, config)
        return evaluate.evaluate_run(run, params, now, bank_seconds)


def _finished(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> dict[str, Any] | None:
    """Returns the results of a run that needs nothing more, None for one that does."""
    path = workdir / "results.json"
    pictured = not config.report.write or (workdir / "report" / "index.html").exists()
    # As the first process sees it: it may be at work on them already while another looks.
    if multihost.broadcast_text("yes" if path.exists() and pictured else "no") == "no":
        return None
    return read_json(path)


def _train(run: RunContext, over: Mesh | None) -> float:
    """Trains to the end, or goes on to it, leaving checkpoints; returns the seconds that the view bank took."""
    config = run.config
    state, now = create_train_state(run.initial, build.optimizer(config)), Progress()
    state = sharding.replicate(state, over)
    extra: dict[str, Any] = {
        "config": config.to_dict(),
        "backbone_fingerprint": run.fingerprint,
        "bank_seconds": 0.0,
        "data": context.data_record(run),
        "standard": run.standard.to_lists() if run.standard else None,
    }
    with multihost.shared_errors():
        owned = take_ownership(run.workdir, config)
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
            with multihost.shared_errors():
                validate_fingerprint(run.fingerprint, extra, run.workdir)
                if changed := context.describe_data_change(run, extra):
                    raise DataError(
                        f"config.data.dir: {changed}, so it cannot go on to the same result; put the data back, or "
                        "train again in another --workdir"
                    )
            print_message(run.console, f"Going on after {_place(now, config).rstrip(',')}")
        if not now.finished:
            with _log(run, now) as log:
                coordinates = _taught(run, over)
                fed, bank_seconds = _feed(run, over, coordinates)
                extra = extra | {"bank_seconds": bank_seconds}
                _loop(run, state, now, fed, log, owned, checkpoints, extra)
        return float(extra["bank_seconds"])


def _taught(run: RunContext, over: Mesh | None) -> Float32[np.ndarray, "images dimensions"] | None:
    """Returns what a run's teacher says of the training images, once it is trained; None for a run without one."""
    if not OBJECTIVES[run.config.objective].taught:
        return None
    teacher = teacher_context(run)
    found = kept(teacher)
    if not multihost.all_processes(found is not None):
        if multihost.is_first_process():
            teacher.workdir.mkdir(exist_ok=True)
            write_json(teacher.workdir / "config.json", teacher.config.to_dict())
        _told_by(run)(f"First a teacher of {teacher.config.epochs} epochs, in {teacher.workdir}")
        _train(teacher, over)
        # By all together, as checkpoints are opened; then by one alone, whose array the others read.
        params, _, _ = restore_best(teacher.workdir, teacher.initial, teacher.config)
        found = multihost.run_first_then_others(
            lambda: coordinates(teacher, params) if multihost.is_first_process() else kept(teacher)
        )
        _told_by(run)("Now the codes, taught by it")
    return found


def _place(now: Progress, config: ml_collections.ConfigDict) -> str:
    if now.steps_of_epoch:
        return f"step {now.step}, in epoch {now.epoch + 1} of {config.epochs},"
    return f"epoch {now.epoch} of {config.epochs}, step {now.step}"


def _told_by(run: RunContext) -> Callable[[str], None]:
    return lambda words: print_message(run.console, words)


@contextlib.contextmanager
def _log(run: RunContext, now: Progress) -> Iterator[MetricLog | None]:
    """Yields what the first process writes down, None in others; opened before the heavy part, since it may refuse."""
    with contextlib.ExitStack() as held:
        log = None
        with multihost.shared_errors():
            if multihost.is_first_process():
                fields = {"writers": run.config.log.writers, "config": run.config.to_dict(), "tell": _told_by(run)}
                log = held.enter_context(MetricLog(run.workdir, now.step, now.epoch, **fields))
        yield log


def _loop(
    run: RunContext,
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
        progress_bar(run.console, "Training", images, now.step * config.batch_size) as moved,
        multihost.sigterm_flag() as stop,
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
                print_message(run.console, f"Epoch {at.epoch}: validation MAP {report.validation_map:.4f}")
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
                key=build.key(config, "steps"),
                epochs=config.epochs,
                batch_size=config.batch_size,
                validate=validator(run),
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
            raise multihost.Preempted(f"{_place(now, config)} is saved in {checkpoints.directory}")


def _feed(
    run: RunContext, over: Mesh | None, coordinates: Float32[np.ndarray, "images dimensions"] | None
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
        "optimizer": build.optimizer(config),
        "objective": config.objective,
        "temperature": config.temperature,
        "beta": config.beta,
        "stochastic": config.binary == "stochastic",
        "sharpness": config.sharpness,
    }
    if config.train.views:
        bank, seconds = features.bank(run)
        return input_pipeline.from_bank(bank, **order, method=method), seconds
    method |= {"augment": config.augment, "micro_batch": config.micro_batch}
    stored_size = config.data.stored_size
    if dataset.size_in_bytes(images.images, stored_size=stored_size) <= config.data.resident_mb * 2**20:
        resident = jnp.asarray(dataset.materialize(images.images, stored_size=stored_size))
        return input_pipeline.from_device(resident, run.frozen, **order, method=method), 0.0
    return input_pipeline.from_stream(images.images, run.frozen, **order, stored_size=stored_size, method=method), 0.0
