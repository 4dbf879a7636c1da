"""Where a run's checkpoints lie: in its own folder, in another, or in a bucket."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from cib_jax.distributed import multihost
from cib_jax.errors import CheckpointError, OtherNetworkError, SaveError
from cib_jax.training.train_step import Progress, TrainState

# training.place: Where a run's checkpoints lie: in its own folder, in another, or in a bucket.


CHOICES = "must be an absolute folder, file:///FOLDER or gs://BUCKET/FOLDER, or empty (checkpoints/ in the workdir)"


def is_valid_checkpoint_dir(words: str) -> bool:
    """Returns whether `train.checkpoint_dir` may have this value, by its form alone.

    A relative folder may not: a run must be found again whatever the current one is. Of the buckets that etils knows,
    Orbax 0.12 writes arrays to Google's alone; s3:// fails in `serialization/tensorstore_utils.py`, which takes it for
    a relative folder.
    """
    if scheme := re.match(r"(\w[\w+.-]*):/", words):
        return bool(re.fullmatch(r"file:///.+|gs://[^/]+/+[^/].*", words)) and scheme[1] in ("file", "gs")
    return not words or pathlib.Path(words).expanduser().is_absolute()


def checkpoint_dir(words: str, workdir: pathlib.Path) -> epath.Path:
    """Returns where the checkpoints of the run in `workdir` lie; `words` is its `train.checkpoint_dir`.

    Raises:
      PlaceError: it is a bucket, and the package that reaches it is not installed.
    """
    if not words:
        return epath.Path(workdir.absolute()) / "checkpoints"
    if not words.startswith("gs://"):
        return epath.Path(pathlib.Path(re.sub("^file://", "", words)).expanduser())
    if importlib.util.find_spec("gcsfs") is None:
        raise CheckpointError(f"config.train.checkpoint_dir: {words} wants a package more; pip install 'cib-jax[gcs]'")
    return epath.Path(words.rstrip("/"))


def is_local(directory: epath.Path) -> bool:
    """Returns whether it is on a disk of this machine, or looks so."""
    return not str(directory).startswith("gs://")


def exists(directory: epath.Path) -> bool:
    """Returns whether anything lies there.

    Raises:
      PlaceError: that cannot be found out.
    """
    try:
        return directory.is_dir()
    except Exception as error:  # Google's libraries raise many kinds
        raise unreachable(directory, "read", error) from error


def unreachable(directory: epath.Path, how: str, error: Exception) -> CheckpointError:
    """Returns what to tell of an error of a file system; `how` is "read" or "written to"."""
    return CheckpointError(
        f"config.train.checkpoint_dir: {directory} cannot be {how} ({type(error).__name__}: {error}); check its name "
        "and your right to it, for a bucket with 'gcloud auth application-default login'"
    )


def within(words: str, *names: str) -> str:
    """Returns the `train.checkpoint_dir` of one of many runs, which may not share a place; "" stays ""."""
    return "/".join([words.rstrip("/"), *names]) if words else ""


# training.checkpoint: Checkpoints of a run: the state, and beside it all that is needed to go on as if nothing had happened.


CHECKSUM = "checksum"
"""Under which the state's digest is kept: a byte that changed on disk must not change a run."""


@dataclasses.dataclass
class _LastAndBest:
    """Keeps the last two checkpoints (the one before serves if the last is damaged) and the best one."""

    best_step: int = 0

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        kept = sorted(checkpoint.step for checkpoint in checkpoints)[-2:]
        if self.best_step:  # 0: none was validated yet, and the untrained one is not the best
            kept.append(self.best_step)
        return [checkpoint.step in kept for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints under `directory`: written in the background, each appears whole or not at all.

    Of several processes, all must open them, save and restore together: each waits for the others.

    `directory` is an absolute path or a gs:// URI (see `place`).
    A context manager; leaving it waits for what is still being written.
    """

    def __init__(self, directory: epath.PathLike, *, read_only: bool = False):
        self.directory = epath.Path(directory)
        self._policy = _LastAndBest()
        told = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # Orbax warns of a folder that is opened only to be read
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy,
                    read_only=read_only,
                    create=not read_only,
                    save_interval_steps=0 if read_only else 1,
                    # What a killed or refused save left: on a full disk, it would be in the way of the next.
                    cleanup_tmp_directories=not read_only,
                ),
            )
        finally:
            logging.set_verbosity(told)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.wait()
            self._manager.close()
        elif not multihost.is_distributed():
            # The exception says more than what closing finds. Of several processes, the others may be gone, without
            # whom a save never ends.
            with contextlib.suppress(Exception):
                self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Progress, extra: dict[str, Any]) -> None:
        """Starts writing a checkpoint; `extra` is kept beside it as JSON (config, versions, …).

        Raises:
          SaveError: there is no room for it, or the one before could not be written.
        """
        self._check_room(progress.step, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        self._policy.best_step = progress.best_step
        # The next step donates the state's buffers while they are still being written: write a copy.
        copy = jax.tree.map(lambda leaf: leaf.copy(), _as_dict(state))
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(copy),
            progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
            extra=ocp.args.JsonSave(extra | {CHECKSUM: _checksum(copy)}),
        )
        with self._told_if_not_written():
            if progress.step in self._manager.all_steps():
                # Stopped after an epoch's last step, and now that epoch is told of. Killed here, the one before serves.
                self._manager.wait_until_finished()
                self._manager.delete(progress.step)
            self._manager.save(progress.step, args=arguments, force=True)

    def wait(self) -> None:
        """Returns when all that was saved is on disk.

        Raises:
          SaveError: it could not be written.
        """
        with self._told_if_not_written():
            self._manager.wait_until_finished()

    def _check_room(self, step: int, size: int) -> None:
        """Checks that a checkpoint fits on the disk before Orbax tries, whose threads tell of a full one at length."""
        if not multihost.is_first_process() or not is_local(self.directory):
            return
        # Besides the numbers, a dozen small files.
        room, wanted = shutil.disk_usage(self.directory).free, size + (size >> 3) + (1 << 18)
        if room < wanted:
            raise SaveError(
                f"{self.directory / str(step)}: the disk has no room for the checkpoint ({wanted / 2**20:,.1f} MiB are "
                f"needed, {room / 2**20:,.1f} are free); make room, and the same command goes on"
            )

    @contextlib.contextmanager
    def _told_if_not_written(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and tensorstore raise many kinds
            if multihost.is_distributed() and multihost.is_peer_failure(error):
                raise
            full = "No space left" in str(error)
            raise SaveError(
                f"{self.directory}: the last checkpoint could not be written "
                f"({'the disk is full' if full else f'{type(error).__name__}: {error}'.splitlines()[0]}); "
                "mend that, and the same command goes on from the one before"
            ) from error

    def restore_newest(
        self, template: TrainState, tell: Callable[[str], None] = lambda words: None
    ) -> tuple[TrainState, Progress, dict[str, Any]]:
        """Returns the newest checkpoint that can be read; see `restore`.

        Where one is damaged, the one before is taken, `tell` is told, and the damaged one is renamed to damaged-STEP.

        Raises:
          CheckpointError: there is none that can be read.
          OtherNetworkError: the newest is another network's; nothing is renamed.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step, before in zip(steps, [*steps[1:], None], strict=True):
            restored, wrong, whole = None, "", False
            try:
                restored = self.restore(template, step)
            except CheckpointError as error:
                wrong, whole = str(error), isinstance(error, OtherNetworkError)
            # What one of several processes cannot read, none takes.
            wrong = next(filter(None, multihost.gather_texts(wrong)), "")
            if restored and not wrong:
                return restored
            if whole:
                raise OtherNetworkError(wrong)
            if before is None:
                raise CheckpointError(wrong)
            what_is_wrong = wrong.partition(";")[0]
            tell(f"{what_is_wrong}; it is renamed to damaged-{step}, and the one before, of step {before}, is taken")
            self._set_aside(step)
        return self.restore(template)

    def without_best(self, template: TrainState, progress: Progress, tell: Callable[[str], None]) -> bool:
        """Returns whether the best checkpoint cannot be read; all are then set aside, and `tell` is told.

        The parameters that a run is judged by are gone with it, and only its whole way leads to them again.
        """
        if not progress.best_step or progress.best_step == progress.step:
            return False
        wrong = ""
        try:
            self.restore(template, progress.best_step)
        except CheckpointError as error:
            wrong = str(error).partition(";")[0]
        wrong = next(filter(None, multihost.gather_texts(wrong)), "")
        if wrong:
            tell(f"{wrong}; it was the best one, so training begins again, to the same result; all are set aside")
            for step in self._manager.all_steps():
                self._set_aside(step)
        return bool(wrong)

    def _set_aside(self, step: int) -> None:
        if multihost.is_first_process():
            # In a bucket a folder is there only with a file in it, so nothing can be moved into a new one.
            aside = self.directory / f"damaged-{step}"
            aside.rmtree(missing_ok=True)
            (self.directory / str(step)).rename(aside)
        multihost.barrier()
        self._manager.reload()

    def restore(self, template: TrainState, step: int | None = None) -> tuple[TrainState, Progress, dict[str, Any]]:
        """Returns the state of `step` (None: the newest), its progress and what was kept beside it.

        Args:
          template: a state of the same structure, shapes and types, laid out on the devices where it is wanted,
            whatever devices it was saved from.
          step: which checkpoint.

        Raises:
          CheckpointError: there is none, or it is damaged.
          OtherNetworkError: it belongs to another network.
        """
        state = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(template)))
        try:
            restored = self._read(
                self.latest_step if step is None else step,
                state=state,
                progress=ocp.args.JsonRestore(),
                extra=ocp.args.JsonRestore(),
            )
        except CheckpointError as error:
            self._check_shapes(template, self.latest_step if step is None else step, error)
            raise
        extra = dict(restored.extra)
        if extra.pop(CHECKSUM, None) not in (None, _checksum(restored.state)):
            folder = self.directory / str(self.latest_step if step is None else step)
            raise CheckpointError(
                f"{folder}: the checkpoint cannot be read (its checksum is not that of its content); remove that "
                "folder to go on from the one before, or use another workdir"
            )
        return TrainState(**restored.state), Progress(**restored.progress), extra

    def _check_shapes(self, template: TrainState, step: int | None, error: CheckpointError) -> None:
        """Tells a checkpoint of other parameters from one that is damaged, by what it says of itself."""
        folder = self.directory / str(step)
        try:
            theirs = _shapes(ocp.StandardCheckpointHandler().metadata(folder / "state").tree)
        except Exception:  # Orbax raises many kinds: it is damaged, as was told
            return
        mine = _shapes(_as_dict(template))
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                there, here = (f"{found[name]}" if name in found else "absent" for found in (theirs, mine))
                raise OtherNetworkError(
                    f"{folder}: the checkpoint is of another network ({name.replace('/', '.')}: {there} there, {here} "
                    "here), as of another version of cib_jax; go on with that version, or train again in another "
                    "workdir"
                ) from error

    def extra(self) -> dict[str, Any]:
        """Returns what was kept beside the newest checkpoint whose notes can be read, without reading its state.

        Raises:
          CheckpointError: there is none.
        """
        steps: list[int | None] = [*sorted(self._manager.all_steps(), reverse=True)]
        for step in steps[:-1]:
            with contextlib.suppress(CheckpointError):
                return self._notes(step)
        return self._notes(steps[-1] if steps else None)

    def _notes(self, step: int | None) -> dict[str, Any]:
        extra = dict(self._read(step, extra=ocp.args.JsonRestore()).extra)
        extra.pop(CHECKSUM, None)
        return extra

    def _read(self, step: int | None, **items: Any) -> Any:
        if step is None:
            raise CheckpointError(f"{self.directory}: there is no checkpoint here; train first, with --mode=train")
        folder = self.directory / str(step)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: the run's best checkpoint is gone; put it back, or train again in another workdir"
            )
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (MemoryError, PermissionError):
            raise  # no damage, for which a checkpoint would be set aside
        except Exception as error:  # Orbax and tensorstore raise many kinds; all else means that this one is unusable
            if multihost.is_distributed() and multihost.is_peer_failure(error):
                raise
            raise CheckpointError(
                f"{folder}: the checkpoint cannot be read ({type(error).__name__}); remove that folder to go on from "
                "the one before, or use another workdir"
            ) from error


def _checksum(state: Any) -> str:
    """Returns a digest of all numbers of a state, in the order of its leaves."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each leaf by its path, whether its parts are keys, numbers or attributes."""

    def name(part: Any) -> str:
        return str(next(getattr(part, field) for field in ("key", "idx", "name") if hasattr(part, field)))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(name, path)): tuple(leaf.shape) for path, leaf in leaves}


def _as_dict(state: TrainState) -> dict[str, Any]:
    # Not dataclasses.asdict, which deep-copies every array on the way.
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
