"""Where a run's checkpoints lie: in its own folder, in another, or in a bucket."""

import importlib.util
import pathlib
import re

from etils import epath

from cib_jax.errors import Refusal

CHOICES = "must be an absolute folder, file:///FOLDER or gs://BUCKET/FOLDER, or empty (checkpoints/ in the workdir)"


class PlaceError(Refusal):
    """Checkpoints cannot lie where the config says; the message names the place and what to do."""


def fits(words: str) -> bool:
    """Returns whether `train.checkpoint_dir` may have this value, by its form alone.

    A relative folder may not: a run must be found again whatever the current one is. Of the buckets that etils knows,
    Orbax 0.12 writes arrays to Google's alone; s3:// fails in `serialization/tensorstore_utils.py`, which takes it for
    a relative folder.
    """
    if scheme := re.match(r"(\w[\w+.-]*):/", words):
        return bool(re.fullmatch(r"file:///.+|gs://[^/]+/+[^/].*", words)) and scheme[1] in ("file", "gs")
    return not words or pathlib.Path(words).expanduser().is_absolute()


def of_run(words: str, workdir: pathlib.Path) -> epath.Path:
    """Returns where the checkpoints of the run in `workdir` lie; `words` is its `train.checkpoint_dir`.

    Raises:
      PlaceError: it is a bucket, and the package that reaches it is not installed.
    """
    if not words:
        return epath.Path(workdir.absolute()) / "checkpoints"
    if not words.startswith("gs://"):
        return epath.Path(pathlib.Path(re.sub("^file://", "", words)).expanduser())
    if importlib.util.find_spec("gcsfs") is None:
        raise PlaceError(f"config.train.checkpoint_dir: {words} wants a package more; pip install 'cib-jax[gcs]'")
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


def unreachable(directory: epath.Path, how: str, error: Exception) -> PlaceError:
    """Returns what to tell of an error of a file system; `how` is "read" or "written to"."""
    return PlaceError(
        f"config.train.checkpoint_dir: {directory} cannot be {how} ({type(error).__name__}: {error}); check its name "
        "and your right to it, for a bucket with 'gcloud auth application-default login'"
    )


def within(words: str, *names: str) -> str:
    """Returns the `train.checkpoint_dir` of one of many runs, which may not share a place; "" stays ""."""
    return "/".join([words.rstrip("/"), *names]) if words else ""
