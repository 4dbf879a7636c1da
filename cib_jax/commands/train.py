"""`--mode=train`: trains an encoder without labels in a workdir, from where it can be resumed, and evaluates it."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
import rich.console
from jaxtyping import Float, UInt8

from cib_jax import diffusion
from cib_jax.commands import evaluate
from cib_jax.config import build, schema
from cib_jax.console import on_stdout, print_message, progress_bar
from cib_jax.data.dataset import ImageSet
from cib_jax.distributed import multihost, sharding
from cib_jax.errors import ConfigError, DataError, TrainingError, UserError, WorkdirError
from cib_jax.files import count
from cib_jax.hint import HINT
from cib_jax.inference.hasher import Hasher, initial_params
from cib_jax.inference.serialization import restore_best, validate_fingerprint
from cib_jax.losses import is_taught
from cib_jax.models.encoder import AUTO, Params, default_dtype
from cib_jax.random_streams import stream_rng
from cib_jax.retrieval import code_quality, metrics
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
from cib_jax.training import checkpoint, grad_cache, metric_writers, train_step, trainer
from cib_jax.training.checkpoint import Checkpoints
from cib_jax.training.loop import EpochReport, Hooks, NonFiniteLossError, Schedule
from cib_jax.training.metric_writers import MetricLog
from cib_jax.training.train_step import Progress, TrainState
from cib_jax.training.trainer import Coordinates, TrainingData

TEACHER_FOLDER = "teacher"
COORDINATES_FILE = "coordinates.npy"


def train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path | str | None = None,
    *,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Trains in `workdir` as `config` says, evaluates the result, and returns the content of results.json.

    An unfinished run of the same config is continued from its last checkpoint, to the same parameters as if it had
    never stopped. A finished one is left as it is. Several processes (`distributed.initialize`) share the work; the
    first one writes and reports.

    Args:
      config: Config with the fields of configs/default.py.
      workdir: Folder of the run; None creates a new one under runs/.
      console: Console to report on.

    Raises:
      UserError: A field, the data, the weights, the devices or the workdir cannot be used; almost always before
        anything expensive starts.
      TrainingError: The loss became NaN or infinite.
      Preempted: SIGTERM came, and the run is saved; the same call continues it.

    Examples:
      >>> import rich.console
      >>> import cib_jax as cib
      >>> from cib_jax.configs import digits
      >>> config = digits.get_config()
      >>> config.update_from_flattened_dict({"epochs": 1, "bits": 16, "image_size": 8, "hidden": 32, "batch_size": 32})
      >>> config.update_from_flattened_dict({"data.train_per_class": 13, "cache.dir": "none", "report.write": False})
      >>> results = cib.train(config, "DIGITS", console=rich.console.Console(quiet=True))
      >>> results["counts"]["query"], results["bits"], 0 < results["map"] < 1
      (297, 16, True)
    """
    with multihost.shared_errors():
        schema.validate(config)
        if config.batch_size:  # otherwise it follows from the number of images
            _devices_of_batch(config, config.batch_size)
        metric_writers.validate_writers(config.log.writers)
    console = on_stdout(console) if multihost.is_first_process() else rich.console.Console(quiet=True)
    workdir = pathlib.Path(multihost.broadcast_text(str(workdir or default_name(config))))
    config = _with_dtype(config, workdir)
    with claim_workdir(workdir):
        with multihost.shared_errors():
            find_owner(workdir, config)
        validate_owner_seen(workdir, config)
        with multihost.shared_errors():
            validate_owner(workdir, config)
        path = workdir / "results.json"
        finished = path.exists() and (not config.report.write or (workdir / "report" / "index.html").exists())
        # The first process decides for all: it may write the file while another one looks for it.
        if multihost.broadcast_text("yes" if finished else "no") == "yes":
            print_message(
                console,
                f"{workdir} holds a finished run of this config; --mode=evaluate --workdir={workdir} measures it again",
            )
            return read_json(path)
        # The first process downloads, decodes and caches; the others find the files.
        run = multihost.run_first_then_others(lambda: context.prepare_run(config, workdir, console))
        context.validate_same_data(run)
        with multihost.shared_errors():
            devices = _devices_of_batch(config, run.schedule.batch_size)
            build.validate_partial_batch(config, len(run.splits.train), devices)
            if is_taught(config.objective):
                diffusion.validate_item_count(len(run.splits.train))
            if multihost.is_first_process() and not (workdir / "config.json").exists():
                _first_params(run)  # refused now if it cannot be loaded
        if multihost.is_first_process():
            # Written after all checks, so that a config with a mistake does not claim the folder.
            write_json(workdir / "config.json", config.to_dict())
        _print_summary(run)
        bank_seconds = _train(run)
        params, progress, _ = restore_best(workdir, run.initial, config)
        return evaluate.evaluate_run(run, params, progress, bank_seconds)


def _devices_of_batch(config: ml_collections.ConfigDict, batch_size: int) -> int:
    """Returns the number of devices that share a batch, after checking that they can."""
    devices = sharding.mesh_size(sharding.make_mesh(config.devices, batch_size))
    if config.micro_batch:
        grad_cache.validate_micro_batch(config.micro_batch, batch_size // devices)
    return devices


def _with_dtype(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config with the dtype with which the run in `workdir` began, or begins now, in place of "auto"."""
    if config.backbone_dtype != AUTO:
        return config
    dtype = default_dtype(config.frozen and config.backbone != "none")
    with contextlib.suppress(OSError, WorkdirError, KeyError):
        dtype = str(read_json(workdir / "config.json")["backbone_dtype"])
    config = config.copy_and_resolve_references()
    config.backbone_dtype = multihost.broadcast_text(dtype)
    return config


def _print_summary(run: RunContext) -> None:
    config, splits = run.config, run.splits
    network = f"{config.backbone} at {run.encoder.image_size} px" if run.encoder.image_size else "no network"
    run.print(
        f"{config.data.name}: {len(splits.train):,} training {run.noun}, "
        f"{count(len(splits.query), 'query', 'queries')}, {len(splits.database):,} in the database; "
        f"{network}, {config.bits} bits, {config.objective}; in {run.workdir}"
    )
    run.print(context.format_protocol(run))
    if mesh := run.training_mesh:
        processes = f"{count(jax.process_count(), 'process', 'processes')} with " if multihost.is_distributed() else ""
        run.print(f"{processes}{mesh.size} devices share each batch")
    if run.console.is_terminal:  # not of one of several workers
        HINT.show("Preparing the training")


# One training run in its folder: resume, train, save.


def _train(run: RunContext, data: TrainingData | None = None) -> float:
    """Trains to the end, or continues to it, and leaves checkpoints; returns the seconds that the view bank took."""
    with multihost.shared_errors():
        owned = take_ownership(run.workdir, run.config)
    with Checkpoints(owned.directory) as checkpoints:
        state, progress, extra = _restore_or_start(run, checkpoints)
        if progress.finished:
            return float(extra.get("bank_seconds", 0.0))
        with _metric_log(run, progress) as log:
            loaded, bank_seconds = (data, 0.0) if data is not None else _load_data(run)
            extra["bank_seconds"] = extra.get("bank_seconds", 0.0) + bank_seconds  # of all sessions, as of the steps
            network, stream = (run.encoder, run.initial, run.frozen), "teacher steps" if run.is_teacher else "steps"
            training_run = build.training_run(run.config, network, loaded, run.training_mesh, stream=stream)
            session = _Session(run, progress, checkpoints, owned, extra, log)
            with session.until_saved:
                learn = functools.partial(_learn_coordinates, run, loaded)
                try:
                    state, progress = trainer.train(
                        training_run, (state, progress), hooks=session.hooks, learn_coordinates=learn
                    )
                except NonFiniteLossError as error:
                    checkpoints.wait()
                    last = checkpoints.directory / str(checkpoints.latest_step)
                    remedy = "in another --workdir with a lower config.learning_rate or a higher config.temperature"
                    raise TrainingError(
                        f"{error}; the last good checkpoint is {last}; train again {remedy}",
                        field="config.learning_rate",
                    ) from None
                if not progress.finished:
                    session.save(state, progress)
                    checkpoints.wait()
                    saved = _format_progress(progress, run.schedule)
                    raise multihost.Preempted(f"{saved} is saved in {checkpoints.directory}")
        return float(extra.get("bank_seconds", 0.0))


def _restore_or_start(run: RunContext, checkpoints: Checkpoints) -> tuple[TrainState, Progress, dict[str, Any]]:
    """Returns the newest checkpoint: state, progress and extra; if there is none, saves and returns the initial one."""

    def initial_state(params: Params) -> TrainState:
        return train_step.initial_state(params, build.optimizer(run.config), run.training_mesh)

    if checkpoints.latest_step is not None:
        state, progress, extra = checkpoints.restore_newest(initial_state(run.initial), run.print)
        if not checkpoints.lacks_best(state, progress, run.print):
            with multihost.shared_errors():
                validate_fingerprint(run.fingerprint, extra, run.workdir)
                if changed := context.describe_data_change(run, extra):
                    remedy = "put the data back, or train again in another --workdir"
                    problem = f"config.data.dir: {changed}, so that the run cannot end with the same result; {remedy}"
                    raise DataError(problem, field="config.data.dir")
            after = f"after {_format_progress(progress, run.schedule).rstrip(',')}"
            run.print(f"Going on {after if progress.step else 'from the first step'}")
            return state, progress, extra
    extra = {
        "config": run.config.to_dict(),
        "backbone_fingerprint": run.fingerprint,
        "bank_seconds": 0.0,
        "data": context.data_record(run),
        "standard": run.standard.to_lists() if run.standard else None,
    }
    with multihost.shared_errors():
        params = _first_params(run)
    state, progress = initial_state(params), Progress()
    # Saved before the first step, so that a run that diverges at once still has a good checkpoint.
    checkpoints.save(state, progress, extra)
    return state, progress, extra


def _first_params(run: RunContext) -> Params:
    """Returns the parameters before the first step: random ones, or those of the run that `init_from` names."""
    place = run.config.init_from
    if not place or run.is_teacher:
        return run.initial
    try:
        return initial_params(Hasher.load(place), run.initial, run.frozen)
    except UserError as error:
        raise ConfigError(f"config.init_from: {place!r} cannot be used: {error}", "config.init_from") from None


def _load_data(run: RunContext) -> tuple[TrainingData, float]:
    """Returns the training data, as a view bank if the config asks for one, and the seconds that the bank took."""
    config, images = run.config, run.splits.train.images
    if views := config.train.views:
        begun = time.perf_counter()
        bank = features.of_views(run, run.splits.train, views, f"View bank, {views} views")
        return TrainingData(images, bank), time.perf_counter() - begun
    stored_size = config.data.stored_size
    loaded = trainer.load_if_small(images, stored_size, config.data.resident_mb * 2**20)
    return TrainingData(loaded, stored_size=stored_size), 0.0


@dataclasses.dataclass
class _Session:
    """What happens around the steps: progress bar, SIGTERM, validation, log and checkpoints."""

    run: RunContext
    start: Progress
    checkpoints: Checkpoints
    owned: Owned
    extra: dict[str, Any]
    log: MetricLog | None
    step: int = 0
    until_saved: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    """Context, from the first step until the state after the last one is saved, in which SIGTERM is only noted."""

    @property
    def hooks(self) -> Hooks:
        return Hooks(make_validation(self.run), self.on_steps, self.on_epoch, self.should_stop, self.during_steps)

    @contextlib.contextmanager
    def during_steps(self) -> Iterator[None]:
        planned = self.run.schedule
        self.step, self.epoch_steps = self.start.step, planned.steps_per_epoch(len(self.run.splits.train))
        images = planned.epochs * self.epoch_steps * planned.batch_size
        self.sigterm_came = self.until_saved.enter_context(multihost.sigterm_flag())
        done, unit = self.start.step * planned.batch_size, self.run.noun
        with progress_bar(self.run.console, "Training", images, done, unit=unit) as self.advance:
            self.advance(0, "compiling the first step")
            yield

    def should_stop(self) -> bool:
        return self.sigterm_came()

    def on_steps(self, steps: int, terms: dict[str, float]) -> None:
        self.step += steps
        # No longer, so that the whole line is seen at 80 columns.
        names = [name for name in ("loss", "kl") if name in terms]
        words = " ".join(
            [f"epoch {-(-self.step // self.epoch_steps)}", *(f"{name} {terms[name]:.4f}" for name in names)]
        )
        self.advance(steps * self.run.schedule.batch_size, words)

    def on_epoch(self, state: TrainState, report: EpochReport) -> None:
        progress = report.progress
        record = {"epoch": progress.epoch, **report.terms, "images_per_second": report.images_per_second}
        if report.score is not None:
            by_map = self.run.config.train.validate_by == "map"
            record["validation_map" if by_map else "separation"] = report.score
            name = "validation MAP" if by_map else "separation"
            self.run.print(f"Epoch {progress.epoch}: {name} {report.score:.4f}")
        if self.log is not None:
            self.log.write(progress.step, record)
        due = progress.epoch % self.run.config.train.checkpoint_every == 0
        if due or progress.finished or report.score is not None:
            self.save(state, progress)

    def save(self, state: TrainState, progress: Progress) -> None:
        self.owned.check()
        self.checkpoints.save(state, progress, self.extra)


def _format_progress(progress: Progress, schedule: Schedule) -> str:
    if progress.steps_of_epoch:
        return f"step {progress.step}, in epoch {progress.epoch + 1} of {schedule.epochs},"
    return f"epoch {progress.epoch} of {schedule.epochs}, step {progress.step}"


@contextlib.contextmanager
def _metric_log(run: RunContext, progress: Progress) -> Iterator[MetricLog | None]:
    """Yields the log in the first process, None in the others; opened early, since a writer may fail to start."""
    log: contextlib.AbstractContextManager[MetricLog | None] = contextlib.nullcontext()
    with multihost.shared_errors():
        if multihost.is_first_process():
            settings = {"writers": run.config.log.writers, "config": run.config.to_dict(), "warn": run.print}
            log = MetricLog(run.workdir, progress.step, progress.epoch, **settings)
    with log as opened:
        yield opened


# Validation during training.


VALIDATED = 2000  # the most training images of which the separation is computed


def make_validation(run: RunContext) -> Callable[[TrainState], float] | None:
    """Returns what computes the score of a state, as `train.validate_by` says; None if nothing is validated."""
    if run.config.train.validate_by == "separation":
        return Separation(run)
    return ValidationMap(run) if run.splits.validation is not None else None


class ChangingCodes:
    """Codes of the same images under parameters that change.

    Features of a frozen backbone are computed for the first codes and kept on the host: only the head changes.
    """

    def __init__(self, run: RunContext, images: ImageSet, title: str):
        self.run, self.images, self.title = run, images, title
        self.features: list[Float[np.ndarray, "part features"]] | None = None

    def __call__(self, params: Params) -> UInt8[np.ndarray, "n bytes"]:
        """Returns the codes of all images, in every process."""
        if not self.run.features_stay:
            return features.codes(self.run, params, self.images, self.title)
        if self.features is None:
            self.features = list(features.plain(self.run, self.images, self.title, shared=True))
        mine = [features.codes_of_features(self.run, params, part) for part in self.features]
        return features.join_codes(self.run, len(self.images), mine)


class ValidationMap:
    """Computes the MAP of the images that are held out."""

    def __init__(self, run: RunContext):
        assert run.splits.validation is not None, "there are held-out images"
        self.run = run
        self.query, self.database = run.splits.validation
        self.query_codes = ChangingCodes(run, self.query, "Validation, query")
        self.database_codes = ChangingCodes(run, self.database, "Validation, database")

    def __call__(self, state: TrainState) -> float:
        """Returns the validation MAP of a state."""
        params = sharding.to_local(state.params)
        query, database = self.query_codes(params), self.database_codes(params)
        query_labels, database_labels = self.query.labels, self.database.labels
        assert query_labels is not None and database_labels is not None, "splits.draw validates labeled images only"
        k = self.run.protocol.k or len(database)

        def mean_of(mine: slice) -> float:
            data = query[mine], database, query_labels[mine], database_labels
            return metrics.mean_average_precision(*data, k, progress=False)  # the bar is that of the training

        return multihost.mean_over_processes(mean_of, len(query))


class Separation:
    """Computes the separation of the codes of random training images, which needs no label."""

    def __init__(self, run: RunContext):
        # Drawn by the seed of the data, so that runs with different seeds share their features and compare.
        draws = stream_rng(run.config.data.seed, "validated images")
        some = np.sort(draws.permutation(len(run.splits.train))[:VALIDATED])
        self.codes = ChangingCodes(run, run.splits.train.take(some), "Validation")

    def __call__(self, state: TrainState) -> float:
        """Returns the separation of a state, the same number in every process."""
        return code_quality.separation(self.codes(sharding.to_local(state.params)))


# The teacher of the objective "diffusion": a run of its own, in the folder teacher/ of its student's workdir.


def teacher_context(run: RunContext) -> RunContext:
    """Returns the context of a run's teacher: the same data and backbone, another head and objective.

    A teacher is not validated, since labels would then choose its checkpoint.
    """
    config = build.teacher_config(run.config, len(run.splits.train))
    with config.unlocked():
        config.train.checkpoint_dir = checkpoint.within(config.train.checkpoint_dir, TEACHER_FOLDER)
    encoder, initial, frozen, _ = build.encoder(config, standard=run.standard, stream="teacher weights")
    frozen = run.frozen or frozen  # the same arrays as the run's, so that a large network is in memory once
    own: dict[str, Any] = {"config": config, "workdir": run.workdir / TEACHER_FOLDER, "is_teacher": True}
    network: dict[str, Any] = {"encoder": encoder, "initial": initial, "frozen": frozen}
    return dataclasses.replace(run, splits=dataclasses.replace(run.splits, validation=None), **own, **network)


def _learn_coordinates(run: RunContext, data: TrainingData) -> Coordinates:
    """Returns the diffusion coordinates of the training images, from a teacher that is trained if it is not yet."""
    teacher = teacher_context(run)
    coordinates = _load_coordinates(teacher)
    if multihost.all_processes(coordinates is not None):
        assert coordinates is not None
        return coordinates
    if multihost.is_first_process():
        teacher.workdir.mkdir(exist_ok=True)
        write_json(teacher.workdir / "config.json", teacher.config.to_dict())
    run.print(f"First a teacher of {teacher.config.epochs} epochs, in {teacher.workdir}")
    _train(teacher, data)
    params, _, _ = restore_best(teacher.workdir, teacher.initial, teacher.config)
    # One process computes and writes them, and the others read the file, so that all have the same bits.
    coordinates = multihost.run_first_then_others(
        lambda: _compute_coordinates(teacher, params) if multihost.is_first_process() else _load_coordinates(teacher)
    )
    assert coordinates is not None
    run.print("Now the codes, with the teacher's coordinates")
    return coordinates


def _load_coordinates(teacher: RunContext) -> Coordinates | None:
    """Returns the coordinates that an earlier session computed, None if there are none that can be read."""
    try:
        coordinates = np.load(teacher.workdir / COORDINATES_FILE, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    items = len(teacher.splits.train)
    shape = (items, min(teacher.config.teacher.dimensions, items - 1))
    return coordinates if coordinates.shape == shape and coordinates.dtype == np.float32 else None


def _compute_coordinates(teacher: RunContext, params: Params) -> Coordinates:
    """Computes and writes the diffusion coordinates of the training images under a trained teacher."""
    images, title = teacher.splits.train, "Encoding for the teacher"
    if teacher.features_stay or teacher.standard is not None:
        parts = features.plain(teacher, images, title)
        both = ((features.logits_of_features(teacher, params, part), part) for part in parts)
        embeddings = diffusion.join_features(len(images), both)
    else:
        embeddings = features.logits(teacher, params, images, title)
    teacher.print(diffusion.describe_neighbors(len(images)))
    with progress_bar(teacher.console, "Neighbors", len(images)) as advance:
        settings = build.teacher(teacher.config)
        neighbors, cosines = settings.neighbors(embeddings, lambda count: advance(count, ""))
        del embeddings  # gigabytes, of a million images
        coordinates = settings.coordinates(neighbors, cosines, lambda: advance(0, "modes of the walk"))
    write_array(teacher.workdir / COORDINATES_FILE, coordinates)
    return coordinates
