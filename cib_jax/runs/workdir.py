"""A run's folder: made, claimed, and written to so that a file is there whole or not at all."""

import contextlib
import datetime
import fcntl
import json
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
from cib_jax.config.schema import MAY_CHANGE, differences, flatten
from cib_jax.distributed import multihost
from cib_jax.errors import BusyError, UserError, WorkdirError
from cib_jax.training import checkpoint
from cib_jax.training.checkpoint import Checkpoints

# jobs.workdir: A run's folder: made, claimed, and written to so that a file is there whole or not at all.


def default_name(config: ml_collections.ConfigDict, mode: str = "train") -> pathlib.Path:
    """Returns a new folder name under runs/ that tells what the run is."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    if mode != "train":
        return pathlib.Path("runs") / f"{mode}-{config.data.name.replace('/', '-')}-{config.backbone}-{now}"
    return pathlib.Path("runs") / f"{config.data.name}-{config.backbone}-{config.objective}-{config.bits}bit-{now}"


LAST_WORDS = ".last-words"
"""Exit code and sentence of a process that ended of itself, so that those that work with it end alike."""

BASELINE = "baseline.json"
"""By which the folder of a baseline is known, and which one."""

KINDS = {"comparison": "cells", "search": "trials"}
"""What holds many runs, and the folder inside by which it is known."""


SEEN_AFTER = 10
"""Seconds in which a network's file system must show what another machine wrote."""


@contextlib.contextmanager
def claim_workdir(workdir: pathlib.Path, *, baseline: bool = False) -> Iterator[None]:
    """Keeps other runs out of a run's folder, which is made if need be, while the context lasts.

    Of several processes that work together, the first claims it for all.

    `baseline` says that it may be a baseline's, which is no run to be gone on with or evaluated.

    Raises:
      BusyError: another process is at work in it.
      WorkdirError: it holds something else than a run, it cannot be written to, or not all processes see it.
    """
    with contextlib.ExitStack() as held:
        with multihost.shared_errors():
            if multihost.is_first_process():
                held.enter_context(_claim(workdir, baseline))
        check_seen(workdir / ".lock", "--workdir")
        yield


def check_seen(mark: pathlib.Path, field: str) -> None:
    """Checks that what the first of several processes writes into a file is there for all.

    Raises:
      SharedRefusal: it is not; `field` names what is to be changed.
    """
    if not multihost.is_distributed():
        return
    token = multihost.broadcast_text(secrets.token_hex(8))
    with multihost.shared_errors():
        if multihost.is_first_process():
            try:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.write_text(token)
            except OSError as error:
                raise WorkdirError(f"{field}: {mark.parent} cannot be written to ({error.strerror})") from None
    with multihost.shared_errors():
        if not any(_reads(mark, token) for _ in range(SEEN_AFTER)):
            raise WorkdirError(
                f"{field}: process {jax.process_index()} does not find in {mark.parent} what the first process wrote "
                "there; choose a folder on a disk that all machines share"
            )


def _reads(mark: pathlib.Path, token: str) -> bool:
    with contextlib.suppress(OSError):
        if mark.read_text() == token:
            return True
    time.sleep(1)
    return False


@contextlib.contextmanager
def _claim(workdir: pathlib.Path, baseline: bool) -> Iterator[None]:
    new = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        inside = {path.name for path in workdir.iterdir()} - {LAST_WORDS}
        if inside and not inside & {".lock", "config.json"}:
            raise WorkdirError(
                f"{workdir}: it holds files, but none of a run ({sorted(inside)[0]}, …); choose another --workdir"
            )
        if BASELINE in inside and not baseline:
            raise WorkdirError(
                f"{workdir}: it holds the figures of a baseline, which has no checkpoint; they are in results.json"
            )
        for kind, folder in KINDS.items():
            if folder in inside:
                raise WorkdirError(f"{workdir}: it holds a {kind} of many runs; choose another --workdir")
        lock = (workdir / ".lock").open("a")
    except OSError as error:
        raise WorkdirError(
            f"{workdir}: cannot be used as a workdir ({error.strerror}); choose another --workdir"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{workdir}: another process is at work in it; wait for it to end or choose another --workdir"
            ) from None
        except OSError as error:
            raise WorkdirError(
                f"{workdir}: the file system cannot lock it ({error.strerror}); choose a --workdir on a local disk"
            ) from None
        try:
            yield
        except UserError:
            if new and [path.name for path in workdir.iterdir()] == [".lock"]:  # nothing was begun
                (workdir / ".lock").unlink()
                workdir.rmdir()
            raise


@contextlib.contextmanager
def exclusive(path: pathlib.Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes out of what stands under the name of a lock file while the context lasts.

    Raises:
      BusyError: another process is in it, and `wait` is False.
    """
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(f"{path}: another process is at work here; wait for it to end") from None
        yield


def adopt(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, kind: str, fixed: frozenset[str] = frozenset()
) -> None:
    """Makes a folder the place of many runs of one `kind`, or checks that it is.

    Several processes may work in it; each run inside is claimed by itself. Fields that do not change a run may differ
    from those it was begun with, but for the `fixed` ones.

    Raises:
      WorkdirError: it holds something else, runs of another config, or cannot be written to.
    """
    marker, path = workdir / KINDS[kind], workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        inside = sorted(file.name for file in workdir.iterdir())
        if inside and not marker.is_dir():
            raise WorkdirError(f"{workdir}: it holds files, but no {kind} ({inside[0]}, …); choose another --workdir")
        if path.exists():
            theirs = flatten(ml_collections.ConfigDict(read_json(path)))
            told = differences(flatten(config), theirs, MAY_CHANGE - fixed)
            if told:
                raise WorkdirError(
                    f"{workdir}: its {kind} has another config ({'; '.join(told)}); choose another --workdir, or give "
                    "the config that it was started with"
                )
        marker.mkdir(exist_ok=True)
        write_json(path, config.to_dict())
    except OSError as error:
        raise WorkdirError(
            f"{workdir}: cannot be used as a workdir ({error.strerror}); choose another --workdir"
        ) from None


def validate_owner(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Checks that a run that was started in `workdir` has this config; one that has no checkpoint yet may have any.

    Raises:
      WorkdirError: it belongs to another config, or its checkpoints lie elsewhere.
      PlaceError: the place of its checkpoints cannot be reached.
    """
    directory = checkpoint.checkpoint_dir(config.train.checkpoint_dir, workdir)
    if not _steps(directory):
        before = checkpoint.checkpoint_dir(_checkpoint_dir_before(workdir), workdir)
        if before != directory and _steps(before):
            raise WorkdirError(
                f"config.train.checkpoint_dir: the checkpoints of {workdir} lie in {before}, and there are none in "
                f"{directory}; copy them there first, or leave the field as it was"
            )
        return
    with Checkpoints(directory, read_only=True) as checkpoints:
        # By the checkpoint, not by config.json, which could be lost or edited.
        theirs = checkpoints.extra()["config"]
    told = differences(flatten(config), flatten(ml_collections.ConfigDict(theirs)))
    if told:
        raise WorkdirError(
            f"{workdir}: it belongs to another config ({'; '.join(told)}); choose another --workdir, or give the "
            "config that it was started with"
        )


def _steps(directory: epath.Path) -> bool:
    # As the first of several processes sees it: to open checkpoints takes all of them.
    if multihost.broadcast_text("there" if checkpoint.exists(directory) else "") == "":
        return False
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.latest_step is not None


def _checkpoint_dir_before(workdir: pathlib.Path) -> str:
    """Returns the field as a run was last started with it; "" where that is not known, as in earlier versions."""
    with contextlib.suppress(OSError, WorkdirError, KeyError, TypeError):
        return str(read_json(workdir / "config.json")["train"]["checkpoint_dir"])
    return ""


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file atomically; of several processes that write it at once, one wins."""
    with files.replacing(path) as part:
        part.write_bytes(content)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file atomically; text that is no valid Unicode, as file names may be, is escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        write_bytes(path, text.encode())
    except UnicodeEncodeError:
        write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns what `write_json` wrote.

    Raises:
      WorkdirError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkdirError(f"{path}: the file is damaged ({error}); remove it to have it made again") from None


def write_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes a .npy file atomically."""
    path.parent.mkdir(exist_ok=True)
    with files.replacing(path) as part, part.open("wb") as file:
        np.save(file, array)


# jobs.ownership: Whose the checkpoints outside a workdir are: its lock does not reach there, and a bucket has none.
#
# A file beside the checkpoints names the workdir that they belong to and the session that last took them. A session of
# another workdir is refused at its start. Two sessions of one workdir, as on two machines after the same command, cannot
# be told apart then: the later one takes the place over, and the earlier one, which looks before each of its saves, ends
# at the next. Between that look and the end of its save another may come; what both write then, checksums tell.


OWNER = "owner.json"
"""Beside the checkpoints: the workdir and the session that they belong to."""

SESSION = ".session"
"""In the workdir: the last session that took them, by which it is known where it was moved to another path."""


class Owned(NamedTuple):
    """Checkpoints as one session's own."""

    directory: epath.Path
    session: str
    """"" where they lie in the workdir, which its lock protects."""

    def check(self) -> None:
        """Checks that no other session has taken them since.

        Raises:
          WorkdirError: one has.
        """
        if self.session and (theirs := _read(self.directory)).get("session") != self.session:
            raise WorkdirError(
                f"{self.directory}: a run in {theirs.get('workdir', 'an unknown workdir')} has taken over the "
                "checkpoints here, so this one has stopped; leave one of them running, or give each a "
                "config.train.checkpoint_dir of its own"
            )


def find_owner(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Checks that the place that a config names for checkpoints may be this workdir's.

    Raises:
      PlaceError, WorkdirError: it cannot be reached, lies in another run's workdir or belongs to one.
    """
    directory = checkpoint.checkpoint_dir(config.train.checkpoint_dir, workdir)
    if not _outside(directory, workdir):
        return
    if checkpoint.is_local(directory) and any(_is_workdir(at) for at in (directory, *directory.parents)):
        raise WorkdirError(
            f"config.train.checkpoint_dir: {directory} is in the workdir of another run; choose a folder of its own"
        )
    owner = _read(directory)
    if not owner or owner.get("workdir") == str(workdir.absolute()):
        return
    held = workdir / SESSION
    if not held.exists() or held.read_text() != owner.get("session"):
        raise WorkdirError(
            f"config.train.checkpoint_dir: the checkpoints in {directory} belong to the run in "
            f"{owner.get('workdir')}; choose another place, or remove {directory / OWNER} if that run is over and this "
            "one goes on with it"
        )


def validate_owner_seen(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Checks that all processes of a run see the same place for its checkpoints.

    Raises:
      SharedRefusal: one does not.
    """
    directory = checkpoint.checkpoint_dir(config.train.checkpoint_dir, workdir)
    if _outside(directory, workdir) and checkpoint.is_local(directory):
        check_seen(pathlib.Path(directory) / ".seen", "config.train.checkpoint_dir")


def take_ownership(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Owned:
    """Makes the place of a run's checkpoints this session's own, once more looked at.

    Raises:
      PlaceError, WorkdirError: as `look`, or it cannot be written to.
    """
    directory = checkpoint.checkpoint_dir(config.train.checkpoint_dir, workdir)
    # Of several processes that work together, the first takes it for all.
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
            (directory / OWNER).write_text(content)  # atomic there by itself
    except Exception as error:  # Google's libraries raise many kinds
        raise checkpoint.unreachable(directory, "written to", error) from error
    write_bytes(workdir / SESSION, owned.session.encode())
    owned.check()
    return owned


def _is_workdir(folder: epath.Path) -> bool:
    return (folder / ".lock").exists() and (folder / "config.json").exists()


def _outside(directory: epath.Path, workdir: pathlib.Path) -> bool:
    return not directory.is_relative_to(workdir.absolute())


def _read(directory: epath.Path) -> dict[str, str]:
    """Returns what is known of the owner of a place, nothing where it has none."""
    path = directory / OWNER
    try:
        if not path.exists():
            return {}
        content = json.loads(path.read_text())
    except ValueError as error:
        raise WorkdirError(f"{path}: the file is damaged ({error}); remove it if no other run uses it") from None
    except Exception as error:  # Google's libraries raise many kinds
        raise checkpoint.unreachable(directory, "read", error) from error
    return content
