"""Reaching LanceDB, and what goes wrong with it told in a sentence."""

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from cib_jax.errors import Refusal


class TableError(Refusal):
    """An index cannot be read, written or used; the message names it and what to do."""


_MISSING = "--index: LanceDB is not installed; pip install 'cib-jax[search]'"


def check_installed() -> None:
    """Checks, without importing it, that LanceDB is there: before photos are learnt from, which takes minutes.

    Raises:
      TableError: it is not installed.
    """
    if importlib.util.find_spec("lancedb") is None:
        raise TableError(_MISSING)


def connected(uri: str) -> Any:
    """Returns LanceDB's connection to a place: a folder, which it makes, or what else it takes.

    Raises:
      TableError: it is not installed, or cannot reach the place.
    """
    try:
        import lancedb
    except ImportError as error:
        raise TableError(_MISSING) from error
    with told(uri, "reached"):
        return lancedb.connect(uri)


def tables(connection: Any, uri: str) -> list[str]:
    """Returns the names of all tables.

    Raises:
      TableError: they cannot be read.
    """
    found: list[str] = []
    with told(uri, "read"):
        while True:
            answer = connection.list_tables(page_token=found[-1] if found else None, limit=100)
            found += answer.tables
            if len(answer.tables) < 100:
                return found


def opens(connection: Any, uri: str, name: str) -> bool:
    """Returns whether a table that `tables` names is whole: of one whose first writer was killed, pieces are listed.

    Raises:
      TableError: it cannot be read.
    """
    with told(uri, "read"):
        try:
            connection.open_table(name)
        except Exception as error:  # LanceDB has no class of its own for any
            if "was not found" in str(error):
                return False
            raise
    return True


def place_of(uri: pathlib.Path | str) -> str:
    """Returns the place that a user named, a folder as an absolute path."""
    text = os.fspath(uri)
    if not text:
        raise TableError("--index: it is empty; give a folder, or what else LanceDB takes, such as s3://bucket/folder")
    return os.path.abspath(os.path.expanduser(text)) if local(text) else text


def local(uri: str) -> bool:
    """Returns whether a place is a folder of this machine."""
    return "://" not in uri


def listed(folder: pathlib.Path) -> list[str]:
    """Returns the names of what is in a folder and not hidden; of none, if it is not there.

    Raises:
      TableError: it cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TableError(
            f"--index: {folder} cannot be read ({error.strerror}); give a folder that you may read"
        ) from None


@contextlib.contextmanager
def told(uri: str, done: str) -> Iterator[None]:
    """Turns whatever LanceDB raises into a TableError, which says what could not be `done` to the index."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:  # LanceDB has no class of its own for any
        raise refused(uri, done, error) from error


def refused(uri: str, done: str, error: Exception) -> TableError:
    """Returns an error of LanceDB in a sentence."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "No space left on device" in str(error):
        first = "the disk is full"
    reason = first.rstrip(".")
    return TableError(
        f"--index: {uri} cannot be {done} ({reason}); mend that, and the same command goes on with what is there"
    )
