"""The folder of a run: its lock, its owner, and atomic writes of JSON files and arrays."""

import contextlib
import datetime
import json
import math
import pathlib
import secrets
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from cib_jax import files
from cib_jax.config import flatten
from cib_jax.config.schema import MAY_CHANGE, differences
from cib_jax.distributed import multihost
from cib_jax.errors import BusyError, UserError, WorkdirError
from cib_jax.files import dump_json, write_bytes
from cib_jax.runs.processes import LAST_WORDS
from cib_jax.training import checkpoint
from cib_jax.training.checkpoint import Checkpoints


def default_name(config: ml_collections.ConfigDict, mode: str = "train") -> pathlib.Path:
    """Returns a new folder under runs/ named after the data set, network, method and time."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    if mode != "train":
        return pathlib.Path("runs") / f"{mode}-{config.data.name.replace('/', '-')}-{config.backbone}-{now}"
    return pathlib.Path("runs") / f"{config.data.name}-{config.backbone}-{config.objective}-{config.bits}bit-{now}"


BASELINE = "baseline.json"
"""File that marks the folder of a baseline and names it."""

KINDS = {"comparison": "cells", "search": "trials"}
"""Kinds of folders that hold many runs, and the subfolder that marks each kind."""

REFUSED = "refused.json"
"""File in the folder of a comparison's run that could not be measured, with the error and its time."""

VISIBLE_SECONDS = 10  # within which a network file system must show what another machine wrote


@contextlib.contextmanager
def claim_workdir(workdir: pathlib.Path, *, baseline: bool = False) -> Iterator[None]:
    """Holds the lock of a run's folder, which is created if necessary, while the context lasts.

    Of several processes of one run, the first holds it for all. With `baseline`, the folder may be that of a baseline,
    which cannot be resumed or evaluated.
    """
    with contextlib.ExitStack() as stack:
        with multihost.shared_errors():
            if multihost.is_first_process():
                stack.enter_context(_claim(workdir, baseline))
        validate_shared(workdir / ".lock", "--workdir")
        yield


def validate_shared(mark: pathlib.Path, field: str) -> None:
    """Checks that all processes of a run see the file `mark`, which the first one writes; else `field` is to blame."""
    if not multihost.is_distributed():
        return
    token = multihost.broadcast_text(secrets.token_hex(8))
    with multihost.shared_errors():
        if multihost.is_first_process():
            try:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.write_text(token)
            except OSError as error:
                raise WorkdirError(f"{field}: {mark.parent} cannot be written to ({error.strerror})", field) from None
    with multihost.shared_errors():
        if not any(_contains(mark, token) for _ in range(VISIBLE_SECONDS)):
            raise WorkdirError(
                f"{field}: process {jax.process_index()} does not see in {mark.parent} what the first process wrote; "
                "choose a folder on a disk that all machines share",
                field,
            )


def _contains(mark: pathlib.Path, token: str) -> bool:
    with contextlib.suppress(OSError):
        if mark.read_text() == token:
            return True
    time.sleep(1)
    return False


@contextlib.contextmanager
def _claim(workdir: pathlib.Path, baseline: bool) -> Iterator[None]:
    new = _missing(workdir)
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            _validate_content({path.name for path in workdir.iterdir()} - {LAST_WORDS, REFUSED}, workdir, baseline)
            stack.enter_context(files.locked(workdir / ".lock", wait=False))
        except BlockingIOError:
            problem = "another process is using it; wait for it to end or choose another --workdir"
            raise BusyError(f"{workdir}: {problem}", "--workdir") from None
        except OSError as error:
            raise _unusable(workdir, error) from None
        try:
            yield
        except UserError:
            if new and [path.name for path in workdir.iterdir()] == [".lock"]:  # nothing was begun
                (workdir / ".lock").unlink()
                _remove_empty(new)
            raise


def _missing(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders that have to be made for a workdir, such as runs/, the innermost first."""
    return [folder for folder in (workdir, *workdir.parents) if not folder.exists()]


def _remove_empty(folders: list[pathlib.Path]) -> None:
    with contextlib.suppress(OSError):  # another run may have begun beside
        for folder in folders:
            folder.rmdir()


def _validate_content(names: set[str], workdir: pathlib.Path, baseline: bool) -> None:
    if names and not names & {".lock", "config.json"}:
        raise _error(workdir, f"it holds files that are not those of a run ({min(names)}, …); choose another --workdir")
    if BASELINE in names and not baseline:
        problem = "it holds the results of a baseline, in results.json, and no checkpoint; choose another --workdir"
        raise _error(workdir, problem)
    for kind, folder in KINDS.items():
        if folder in names:
            raise _error(workdir, f"it holds a {kind} of many runs; choose another --workdir")


def _error(workdir: pathlib.Path, problem: str) -> WorkdirError:
    return WorkdirError(f"{workdir}: {problem}", "--workdir")


def _unusable(workdir: pathlib.Path, error: OSError) -> WorkdirError:
    remedy = "choose another --workdir, on a disk that supports locks"
    return _error(workdir, f"cannot be used as a workdir ({error.strerror}); {remedy}")


@contextlib.contextmanager
def exclusive(path: pathlib.Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path` while the context lasts; raises BusyError if it is held, and `wait` is False."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path, wait=wait))
        except BlockingIOError:
            raise BusyError(f"{path}: another process is using it; wait for it to end") from None
        yield


@contextlib.contextmanager
def adopt(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, kind: str, fixed: frozenset[str] = frozenset()
) -> Iterator[None]:
    """Makes a folder one of many runs of a `kind`, or checks that it is one with the same config.

    If the first run in it is refused before anything is computed, the folder is removed at the end. Several processes
    may work in it; each run inside has a lock of its own. Fields that do not change a run may differ from those of the
    first start, except for the `fixed` ones.
    """
    marker, path, new = workdir / KINDS[kind], workdir / "config.json", _missing(workdir) or [workdir]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        names = sorted(file.name for file in workdir.iterdir())
        if names and not marker.is_dir():
            problem = f"it holds files that are not those of a {kind} ({names[0]}, …); choose another --workdir"
            raise _error(workdir, problem)
        if path.exists():
            _validate_same_config(workdir, config, read_json(path), MAY_CHANGE - fixed)
        marker.mkdir(exist_ok=True)
        write_json(path, config.to_dict())
    except OSError as error:
        raise _unusable(workdir, error) from None
    try:
        yield
    except UserError:
        made = sorted(workdir.rglob("*"), reverse=True)  # what is in a folder comes before the folder
        nothing = (path.name, REFUSED, ".lock")
        if not names and all(file.is_dir() or file.name.endswith(nothing) for file in made):
            for file in made:
                file.rmdir() if file.is_dir() else file.unlink()
            _remove_empty(new)
        raise


def _validate_same_config(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, theirs: dict[str, Any], ignored: frozenset[str]
) -> None:
    try:
        changed = differences(flatten(config), flatten(ml_collections.ConfigDict(theirs)), ignored)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _error(workdir, f"its config is damaged ({files.first_line(error)}); choose another --workdir") from None
    if changed:
        remedy = "choose another --workdir, or give the config that it was started with"
        raise _error(workdir, f"it belongs to another config ({'; '.join(changed)}); {remedy}")


def validate_owner(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Checks that the run in `workdir` has this config; a run without a checkpoint may have any."""
    directory = checkpoint.checkpoint_dir(config.train.checkpoint_dir, workdir)
    if not _has_checkpoints(directory):
        value = ""  # the field at the last start of the run; unknown in earlier versions
        with contextlib.suppress(FileNotFoundError, WorkdirError, KeyError, TypeError):
            value = str(read_json(workdir / "config.json")["train"]["checkpoint_dir"])
        before = checkpoint.checkpoint_dir(value, workdir)
        if before != directory and _has_checkpoints(before):
            raise _directory_error(
                f"the checkpoints of {workdir} are in {before}, and there are none in {directory}; copy them there "
                "first, or leave the field as it was"
            )
        return
    with Checkpoints(directory, read_only=True) as checkpoints:
        # The config in the checkpoint, since config.json could be lost or edited.
        _validate_same_config(workdir, config, checkpoints.entry("config", dict), MAY_CHANGE)


def _has_checkpoints(directory: epath.Path) -> bool:
    # As seen by the first of several processes: all of them have to open checkpoints together.
    if multihost.broadcast_text("there" if checkpoint.exists(directory) else "") == "":
        return False
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.latest_step is not None


def _directory_error(problem: str) -> WorkdirError:
    return WorkdirError(f"config.train.checkpoint_dir: {problem}", "config.train.checkpoint_dir")


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file atomically; text that is not valid Unicode, such as some file names, is escaped."""
    write_bytes(path, f"{dump_json(content, indent=2)}\n".encode())


_NUMBER, _SCORE = (int, float), (int, float, type(None))
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "results.json": {
        "map": _SCORE,
        "map_tie_aware": _SCORE,
        "k": int,
        "metrics": dict,
        "metrics.code_health": dict,
        "metrics.code_health.entropy": _NUMBER,
        "metrics.code_health.mean_abs_correlation": _NUMBER,
        "seconds": dict,
        "seconds.train": _NUMBER,
    },
    "trial.json": {"number": int, "params": dict, "value": _SCORE, "scores": dict, "error": str},
    "refused.json": {"error": str, "when": _NUMBER},
}
"""Fields that files of these names must have, a dot for a dict inside, with their types."""
_TEXTS = ("data", "backbone_fingerprint")
"""Fields that some of these files have, as texts."""


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a file that `write_json` wrote.

    Raises:
      FileNotFoundError: There is none.
      WorkdirError: It is damaged.
    """
    try:
        content = files.read_json(path)
        if not isinstance(content, dict):
            raise ValueError("it does not hold a dict")
        fields = _FIELDS.get(path.name, {})
        for name, types in (fields | {name: str for name in _TEXTS if fields and name in content}).items():
            place = content
            *outer, inner = name.split(".")
            for part in outer:
                place = place[part]
            value = place.get(inner, ...)
            if not isinstance(value, types) or value in (math.inf, -math.inf):
                raise ValueError(f"its {name} is missing, of another type or infinite")
        return content
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = files.short_reason(error)
        raise WorkdirError(f"{path}: the file is damaged ({reason}); remove it, and it will be written again") from None


def write_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes a .npy file atomically."""
    path.parent.mkdir(exist_ok=True)
    with files.replacing(path) as part, part.open("wb") as file:
        np.save(file, array)


# Ownership of a checkpoint directory outside the workdir, where the workdir's lock has no effect.
#
# A file beside the checkpoints names the workdir that they belong to and the session that took them last. A session of
# another workdir is refused when it starts. Two sessions of the same workdir, such as the same command on two machines,
# cannot be told apart at that time: the later one takes the directory over, and the earlier one, which checks before
# each save, ends at its next save. If another session arrives between that check and the end of the save, checksums
# reveal what both have written.

OWNER = "owner.json"
"""File beside the checkpoints with the workdir and the session that they belong to."""

SESSION = ".session"
"""File in the workdir with its last session, which identifies it after the workdir has been moved."""


class Owned(NamedTuple):
    """A checkpoint directory owned by this session."""

    directory: epath.Path
    session: str
    """"" for a directory inside the workdir, which the workdir's lock protects."""

    def check(self) -> None:
        """Checks that no other session has taken the directory over."""
        if self.session and (theirs := _read_owner(self.directory)).get("session") != self.session:
            raise WorkdirError(
                f"{self.directory}: a run in {theirs.get('workdir', 'an unknown workdir')} has taken over the "
                "checkpoints here, so this run has stopped; leave only one of them running, or give each its own "
                "config.train.checkpoint_dir",
                "config.train.checkpoint_dir",
            )


def find_owner(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Checks that the checkpoint directory of a config may belong to this workdir."""
    directory = checkpoint.checkpoint_dir(config.train.checkpoint_dir, workdir)
    if not _outside(directory, workdir):
        return
    if checkpoint.is_local(directory) and any(
        (folder / ".lock").exists() and (folder / "config.json").exists() for folder in (directory, *directory.parents)
    ):
        raise _directory_error(f"{directory} is in the workdir of another run; choose a separate folder")
    owner = _read_owner(directory)
    if not owner or owner.get("workdir") == str(workdir.absolute()):
        return
    session = workdir / SESSION
    if not session.is_file() or session.read_text() != owner.get("session"):
        raise _directory_error(
            f"the checkpoints in {directory} belong to the run in {owner.get('workdir')}; choose another folder, or "
            f"remove {directory / OWNER} if that run is over and this one continues it"
        )


def validate_owner_seen(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Checks that all processes of a run see the same checkpoint directory."""
    directory = checkpoint.checkpoint_dir(config.train.checkpoint_dir, workdir)
    if _outside(directory, workdir) and checkpoint.is_local(directory):
        validate_shared(pathlib.Path(directory) / ".seen", "config.train.checkpoint_dir")


def take_ownership(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Owned:
    """Makes this session the owner of the run's checkpoint directory, after checking it again."""
    directory = checkpoint.checkpoint_dir(config.train.checkpoint_dir, workdir)
    # The first of several processes takes it for all.
    if not _outside(directory, workdir) or not multihost.is_first_process():
        return Owned(directory, "")
    find_owner(workdir, config)
    owned = Owned(directory, secrets.token_hex(8))
    content = json.dumps({"workdir": str(workdir.absolute()), "session": owned.session}) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if checkpoint.is_local(directory):
            write_bytes(pathlib.Path(directory / OWNER), content.encode())
        else:
            (directory / OWNER).write_text(content)  # writes to a bucket are atomic
    except Exception as error:  # Google's libraries raise many classes
        raise checkpoint.unreachable(directory, "written to", error) from error
    write_bytes(workdir / SESSION, owned.session.encode())
    owned.check()
    return owned


def _outside(directory: epath.Path, workdir: pathlib.Path) -> bool:
    return not directory.is_relative_to(workdir.absolute())


def _read_owner(directory: epath.Path) -> dict[str, str]:
    """Returns the owner of a checkpoint directory, {} if it has none."""
    path = directory / OWNER
    try:
        if not path.exists():
            return {}
        content = files.read_json(pathlib.Path(path)) if checkpoint.is_local(path) else json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it does not hold a dict")
    except (ValueError, RecursionError) as error:
        raise WorkdirError(f"{path}: the file is damaged ({error}); remove it if no other run uses it") from None
    except Exception as error:  # Google's libraries raise many classes
        raise checkpoint.unreachable(directory, "read", error) from error
    return content
