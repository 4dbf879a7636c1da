"""Whose the checkpoints outside a workdir are: its lock does not reach there, and a bucket has none.

A file beside the checkpoints names the workdir that they belong to and the session that last took them. A session of
another workdir is refused at its start. Two sessions of one workdir, as on two machines after the same command, cannot
be told apart then: the later one takes the place over, and the earlier one, which looks before each of its saves, ends
at the next. Between that look and the end of its save another may come; what both write then, checksums tell.
"""

import json
import pathlib
import secrets
from typing import NamedTuple

import ml_collections
from etils import epath

from cib_jax.devices import processes
from cib_jax.jobs import workdir as workdir_lib
from cib_jax.jobs.workdir import WorkdirError
from cib_jax.training import place

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


def look(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Checks that the place that a config names for checkpoints may be this workdir's.

    Raises:
      PlaceError, WorkdirError: it cannot be reached, lies in another run's workdir or belongs to one.
    """
    directory = place.of_run(config.train.checkpoint_dir, workdir)
    if not _outside(directory, workdir):
        return
    if place.is_local(directory) and any(_is_workdir(at) for at in (directory, *directory.parents)):
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


def check_seen(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Checks that all processes of a run see the same place for its checkpoints.

    Raises:
      SharedRefusal: one does not.
    """
    directory = place.of_run(config.train.checkpoint_dir, workdir)
    if _outside(directory, workdir) and place.is_local(directory):
        workdir_lib.check_seen(pathlib.Path(directory) / ".seen", "config.train.checkpoint_dir")


def take(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Owned:
    """Makes the place of a run's checkpoints this session's own, once more looked at.

    Raises:
      PlaceError, WorkdirError: as `look`, or it cannot be written to.
    """
    directory = place.of_run(config.train.checkpoint_dir, workdir)
    # Of several processes that work together, the first takes it for all.
    if not _outside(directory, workdir) or not processes.first():
        return Owned(directory, "")
    look(workdir, config)
    owned = Owned(directory, secrets.token_hex(8))
    content = json.dumps({"workdir": str(workdir.absolute()), "session": owned.session}) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if place.is_local(directory):
            workdir_lib.write_bytes(pathlib.Path(directory / OWNER), content.encode())
        else:
            (directory / OWNER).write_text(content)  # atomic there by itself
    except Exception as error:  # Google's libraries raise many kinds
        raise place.unreachable(directory, "written to", error) from error
    workdir_lib.write_bytes(workdir / SESSION, owned.session.encode())
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
        raise place.unreachable(directory, "read", error) from error
    return content
