"""Checkpoints of a run: where they are, and how they are written, restored and verified.

A checkpoint holds the training state, its progress, and as JSON everything else that is needed to continue the run as
if it had never stopped. It is written in the background, and appears whole or not at all.
"""

import contextlib
import dataclasses
import hashlib
import json
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
from cib_jax.files import first_line, install_command, is_installed
from cib_jax.training.train_step import Progress, TrainState

CHECKSUM = "checksum"  # name of the checkpoint's digest in its JSON part, by which a byte that changed is noticed

# The directory of a run's checkpoints: in its workdir, elsewhere on a disk, or in a bucket.


def checkpoint_dir(value: str, workdir: pathlib.Path) -> epath.Path:
    """Returns the directory of the checkpoints of the run in `workdir`, for its `train.checkpoint_dir`."""
    if not value:
        return epath.Path(workdir.absolute()) / "checkpoints"
    if not value.startswith("gs://"):
        return epath.Path(pathlib.Path(re.sub("^file://", "", value)).expanduser())
    if not is_installed("gcsfs"):
        field = "config.train.checkpoint_dir"
        raise CheckpointError(f"{field}: {value} needs an extra package: {install_command('gcs')}", field=field)
    return epath.Path(value.rstrip("/"))


def is_local(directory: epath.Path) -> bool:
    """Returns whether a directory is on a disk of this machine, or mounted like one."""
    return not str(directory).startswith("gs://")


def exists(directory: epath.Path) -> bool:
    """Returns whether a directory exists."""
    try:
        return directory.is_dir()
    except Exception as error:  # Google's libraries raise errors of many types
        raise unreachable(directory, "read", error) from error


def unreachable(directory: epath.Path, action: str, error: Exception) -> CheckpointError:
    """Returns the error for a file system that fails; `action` is "read" or "written to"."""
    return CheckpointError(
        f"config.train.checkpoint_dir: {directory} cannot be {action} ({type(error).__name__}: {error}); check its "
        "name and your permissions, for a bucket with 'gcloud auth application-default login'",
        field="config.train.checkpoint_dir",
    )


def within(value: str, *names: str) -> str:
    """Returns the `train.checkpoint_dir` of one of many runs, each of which needs its own; "" stays ""."""
    return "/".join([value.rstrip("/"), *names]) if value else ""


# Writing, restoring and verifying.


@dataclasses.dataclass
class _LastAndBest:
    """Keeps the best checkpoint and the last two, of which the older one is used if the newer one is damaged."""

    best_step: int = 0

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        kept = sorted(checkpoint.step for checkpoint in checkpoints)[-2:]
        if self.best_step:  # 0 before the first validation: the initial checkpoint is not the best one
            kept.append(self.best_step)
        return [checkpoint.step in kept for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints in a directory (a path, or a gs:// URI), a context manager that waits at its end for its writes.

    Several processes must open them, save and restore together, since each waits for the others.
    """

    def __init__(self, directory: epath.PathLike, *, read_only: bool = False):
        self.directory = epath.Path(directory)
        self._policy = _LastAndBest()
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # Orbax warns when a directory is opened read-only
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy,
                    read_only=read_only,
                    create=not read_only,
                    save_interval_steps=0 if read_only else 1,
                    # Left by a save that was killed or failed; on a full disk it would prevent the next save.
                    cleanup_tmp_directories=not read_only,
                ),
            )
        except (ValueError, TypeError, ArithmeticError) as error:  # of metadata, which Orbax reads at once
            problem = f"the file _CHECKPOINT_METADATA of a checkpoint here is damaged ({first_line(error)})"
            remedy = "remove the folder of that checkpoint to continue from another one, or use another workdir"
            raise _error(CheckpointError, self.directory, f"{problem}; {remedy}") from error
        finally:
            logging.set_verbosity(verbosity)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.wait()
            self._manager.close()
        elif not multihost.is_distributed():
            # Errors of closing say less than the exception. With several processes it is not closed: the others may
            # have ended, and a save without them never returns.
            with contextlib.suppress(Exception):
                self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Progress, extra: dict[str, Any]) -> None:
        """Starts writing a checkpoint; `extra` is its JSON part. An error may be that of the previous checkpoint."""
        self._check_room(progress.step, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        self._policy.best_step = progress.best_step
        # A copy, since the next step donates the state's buffers while they are still being written.
        copy = jax.tree.map(lambda leaf: leaf.copy(), _as_dict(state))
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(copy),
            progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
            extra=ocp.args.JsonSave(extra | {CHECKSUM: _checksum(copy, dataclasses.asdict(progress), extra)}),
        )
        with self._save_errors():
            if progress.step in self._manager.all_steps():
                # The run was stopped after the last step of an epoch; now the epoch itself is recorded. If the process
                # is killed between the two calls, the previous checkpoint is used.
                self._manager.wait_until_finished()
                self._manager.delete(progress.step)
            self._manager.save(progress.step, args=arguments, force=True)

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        with self._save_errors():
            self._manager.wait_until_finished()

    def _check_room(self, step: int, size: int) -> None:
        """Checks that the disk has room for a checkpoint, before Orbax's threads fail with many messages."""
        if not multihost.is_first_process() or not is_local(self.directory):
            return
        # An eighth and 256 KiB more, for metadata.
        free, needed = shutil.disk_usage(self.directory).free, size + (size >> 3) + (1 << 18)
        if free < needed:
            sizes = f"{needed / 2**20:,.1f} MiB are needed, {free / 2**20:,.1f} are free"
            problem = f"the disk has no room for the checkpoint ({sizes}); make room, and run the same command again"
            raise SaveError(f"{self.directory / str(step)}: {problem}", field=str(self.directory))

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise errors of many types
            if multihost.is_distributed() and multihost.is_peer_failure(error):
                raise
            full = "No space left" in str(error)
            reason = "the disk is full" if full else f"{type(error).__name__}: {error}".splitlines()[0]
            problem = f"the last checkpoint could not be written ({reason}); repair that, and the same command"
            raise _error(SaveError, self.directory, f"{problem} continues from the previous one") from error

    def restore_newest(
        self, template: TrainState, warn: Callable[[str], None] = lambda sentence: None
    ) -> tuple[TrainState, Progress, dict[str, Any]]:
        """Returns the newest checkpoint that can be read: its state, progress and JSON part.

        A damaged one is reported by `warn` and renamed to damaged-STEP, and the previous one is read instead. One of
        another network is an OtherNetworkError, and nothing is renamed.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step, before in zip(steps, [*steps[1:], None], strict=True):
            restored, problem, kind = None, "", CheckpointError
            try:
                restored = self.restore(template, step)
            except CheckpointError as error:
                problem, kind = str(error), type(error)
            # A checkpoint that one process cannot read is used by none.
            problem = next(filter(None, multihost.gather_texts(problem)), "")
            if restored and not problem:
                return restored
            if before is None or kind is OtherNetworkError:
                raise kind(problem, field=str(self.directory / str(step)))
            cause = problem.partition(";")[0]
            warn(f"{cause}; it is renamed to damaged-{step}, and the previous one, of step {before}, is used")
            self._set_aside(step)
        return self.restore(template)

    def lacks_best(self, template: TrainState, progress: Progress, warn: Callable[[str], None]) -> bool:
        """Returns whether the best checkpoint cannot be read; all checkpoints are then renamed, and `warn` is called.

        Without it, only training from the beginning leads to the parameters that the run is evaluated by.
        """
        if not progress.best_step or progress.best_step == progress.step:
            return False
        problem = ""
        try:
            self.restore(template, progress.best_step)
        except CheckpointError as error:
            problem = str(error).partition(";")[0]
        problem = next(filter(None, multihost.gather_texts(problem)), "")
        if problem:
            warn(f"{problem}; it was the best one, so training begins again, to the same result; all are set aside")
            for step in self._manager.all_steps():
                self._set_aside(step)
        return bool(problem)

    def _set_aside(self, step: int) -> None:
        if multihost.is_first_process():
            # Renamed, not moved into a new folder: a bucket has no empty folders.
            aside = self.directory / f"damaged-{step}"
            aside.rmtree(missing_ok=True)
            (self.directory / str(step)).rename(aside)
        multihost.barrier()
        self._manager.reload()

    def restore(self, template: TrainState, step: int | None = None) -> tuple[TrainState, Progress, dict[str, Any]]:
        """Returns the state, progress and JSON part of a checkpoint, by default of the newest one.

        The state is put on the devices of the `template`, a state of the same structure, shapes and types. Where its
        `opt_state` is None, that of the checkpoint is returned as nested dicts and lists: encoding needs no optimizer.
        """
        step = self.latest_step if step is None else step
        folder = self.directory / str(step)
        try:
            if template.opt_state is None and step is not None:
                template = _with_stored_optimizer(template, folder)
            state = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(template)))
            restored = self._read(step, state=state, progress=ocp.args.JsonRestore(), extra=ocp.args.JsonRestore())
        except CheckpointError as error:
            _validate_shapes(template, folder, error)
            raise
        try:
            extra, progress = dict(restored.extra), _progress(restored.progress)
        except (TypeError, ValueError) as problem:
            raise _damaged(folder, f"its metadata are damaged: {problem}") from problem
        checksum = extra.pop(CHECKSUM, None)
        metadata = restored.progress, extra
        # The last two are those of earlier versions.
        sums = (_checksum(restored.state, *metadata), _old_checksum(restored.state, *metadata))
        if checksum not in sums and checksum != _old_checksum(restored.state):
            raise _damaged(folder, "its checksum is not that of its content")
        return TrainState(**restored.state), progress, extra

    def extra(self) -> dict[str, Any]:
        """Returns the JSON part of the newest checkpoint in which that can be read, without reading the state."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps or [None]:
            try:
                extra = dict(self._read(step, extra=ocp.args.JsonRestore()).extra)
                break
            except CheckpointError:
                if step is None or step == steps[-1]:
                    raise
        extra.pop(CHECKSUM, None)
        return extra

    def entry(self, name: str, parse: Callable[[Any], Any]) -> Any:
        """Returns what `parse` makes of an entry of `extra`; raises a CheckpointError if the entry is damaged."""
        try:
            return parse(self.extra()[name])
        except CheckpointError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise _damaged(self.directory, f"its {name} is damaged") from error

    def _read(self, step: int | None, **items: Any) -> Any:
        if step is None:
            problem = "there is no checkpoint here; train first, with --mode=train"
            raise _error(CheckpointError, self.directory, problem)
        folder = self.directory / str(step)
        if not folder.is_dir():
            problem = "the checkpoint is missing; put it back, or train again in another workdir"
            raise _error(CheckpointError, folder, problem)
        try:
            if is_local(self.directory):
                for path in pathlib.Path(folder).rglob("*"):
                    if not path.is_dir() and not path.is_file():  # the pipe of somebody else would be waited for
                        raise ValueError(f"{path.name} is not a regular file")
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (MemoryError, PermissionError):
            raise  # the checkpoint itself is not damaged
        except Exception as error:  # Orbax and TensorStore raise errors of many types for damaged files
            if multihost.is_distributed() and multihost.is_peer_failure(error):
                raise
            raise _damaged(folder, type(error).__name__) from error


def _error(kind: type[CheckpointError], path: epath.Path, problem: str) -> CheckpointError:
    return kind(f"{path}: {problem}", field=str(path))


def _damaged(folder: epath.Path, reason: str) -> CheckpointError:
    remedy = "remove that folder to continue from the previous one, or use another workdir"
    return _error(CheckpointError, folder, f"the checkpoint cannot be read ({reason}); {remedy}")


def _with_stored_optimizer(template: TrainState, folder: epath.Path) -> TrainState:
    """Returns the template with the shapes of a checkpoint's optimizer, on the devices of the parameters."""
    (device, *_) = {leaf.sharding for leaf in jax.tree.leaves(template.params)}
    try:
        stored = ocp.StandardCheckpointHandler().metadata(folder / "state").tree["opt_state"]
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)
    except Exception as error:  # Orbax raises errors of many types
        raise _damaged(folder, f"its metadata are damaged: {type(error).__name__}") from error
    return dataclasses.replace(template, opt_state=shapes)


def _validate_shapes(template: TrainState, folder: epath.Path, error: CheckpointError) -> None:
    """Raises OtherNetworkError if a checkpoint is not damaged, but its metadata list other parameters."""
    try:
        theirs = _shapes(ocp.StandardCheckpointHandler().metadata(folder / "state").tree)
    except Exception:  # Orbax raises errors of many types: the metadata are damaged, too
        return
    mine = _shapes(_as_dict(template))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            there, here = (f"{shapes[name]}" if name in shapes else "absent" for shapes in (theirs, mine))
            raise _error(
                OtherNetworkError,
                folder,
                f"the checkpoint belongs to another network ({name.replace('/', '.')}: {there} there, {here} here), "
                "perhaps of another version of cib_jax; continue with that version, or train again in another workdir",
            ) from error


def _progress(content: dict[str, Any]) -> Progress:
    """Returns the progress in the JSON part of a checkpoint; raises a TypeError for other fields or types."""
    content = dict(content)
    if "best_map" in content:  # the name of earlier versions
        content["best_score"] = content.pop("best_map")
    progress = Progress(**content)
    for name, default in vars(Progress()).items():
        if not isinstance(getattr(progress, name), int | float if isinstance(default, float) else type(default)):
            raise TypeError(f"{name} must be of the type {type(default).__name__}")
    return progress


def _checksum(state: Any, *metadata: dict[str, Any]) -> str:
    """Returns a digest of all numbers of a state, by the paths of its leaves, and of JSON."""
    return _digest(sorted(_leaves(state).items()), metadata)


def _old_checksum(state: Any, *metadata: dict[str, Any]) -> str:
    """Returns the digest of earlier versions, which depends on the types of an optimizer's state."""
    return _digest([(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(state)], metadata)


def _digest(leaves: Sequence[tuple[str, Any]], metadata: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in metadata:
        digest.update(json.dumps(part, sort_keys=True).encode())
    for name, leaf in leaves:
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by their paths, written alike for keys, indices and attributes."""

    def name(part: Any) -> str:
        return str(next(getattr(part, field) for field in ("key", "idx", "name") if hasattr(part, field)))

    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _leaves(tree).items()}


def _as_dict(state: TrainState) -> dict[str, Any]:
    # Not dataclasses.asdict, which deep-copies every array.
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
