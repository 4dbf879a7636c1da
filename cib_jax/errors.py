"""Errors for mistakes that a user can correct, and counts in words for messages."""

from __future__ import annotations

import operator


class UserError(ValueError):
    """Invalid user input; the message names what was given, what is allowed and what to do.

    `run.py` prints the message without a traceback, and so does a notebook. Code that calls the functions can catch it
    like any ValueError. `Refusal` is an older name of this class.

    Attributes:
      field: The config field, flag, argument or file to blame, such as "config.bits" or "--workdir"; "" if there is
        no single one.

    Examples:
      >>> import cib_jax as cib
      >>> try:
      ...     cib.read_corpus("nowhere")
      ... except cib.UserError as error:
      ...     print(type(error).__name__)
      CodeStoreError
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field

    def _render_traceback_(self) -> list[str]:
        """Returns what IPython prints in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


Refusal = UserError


def whole_number(name: str, value: object, least: int, error: type[UserError] = UserError, remedy: str = "") -> int:
    """Returns a whole number of `least` or more as a Python int; raises `error` for any other value."""
    if not isinstance(value, bool) and hasattr(value, "__index__") and operator.index(value) >= least:
        return operator.index(value)
    problem = f"{name} must be a whole number, {least} or more, got {value!r}"
    raise error(f"{problem}; {remedy}" if remedy else problem, field=name)


class ConfigError(UserError):
    """A config field, flag or argument has an invalid value, or does not go together with another one."""


class DataError(UserError):
    """A data set is missing, unreadable, too small or holds invalid values."""


class WeightsError(UserError):
    """A weight file is missing, damaged, unsafe to read or of another network."""


class WorkdirError(UserError):
    """The folder of a run cannot be used."""


class BusyError(WorkdirError):
    """Another process is using the folder of a run."""


class CheckpointError(UserError):
    """A checkpoint, or the place where checkpoints are kept, cannot be used."""


class OtherNetworkError(CheckpointError):
    """A checkpoint is intact but belongs to a network with other parameters."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


class TrainingError(UserError):
    """Training diverged."""


class DevicesError(UserError):
    """There are too few devices, or a batch cannot be divided evenly among them."""


class DistributedError(UserError):
    """The processes of one run cannot work together."""


class SharedRefusal(UserError):  # noqa: N818 - persisted in messages between processes
    """An error of one process, raised in all processes of a run."""


class CodeStoreError(UserError):
    """A folder of codes cannot be read or written."""


class SearchError(UserError):
    """A search, or the index it needs, is not possible as requested."""


class IndexFolderError(UserError):
    """The folder of an index cannot be read or written."""


class SavedHasherError(UserError):
    """A hasher cannot be saved or loaded."""


class ExportedError(UserError):
    """An exported encoder cannot be read, or not on this platform."""


class MissingExtraError(UserError):
    """An optional dependency is not installed."""


class WebError(UserError):
    """The search page cannot be served as requested."""
