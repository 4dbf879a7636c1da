"""The one door: `python run.py --config=configs/NAME.py --workdir=DIR --mode=train|evaluate`; any field by --config.FIELD=VALUE."""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py", "The experiment's file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; by default a new one under runs/.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "train (and then evaluate), or evaluate alone.")


def parse(arguments: Sequence[str]) -> list[str]:
    """Reads the flags; a user's mistake ends the program with one sentence."""
    try:
        rest = flags.FLAGS(list(arguments))
        if not hasattr(_CONFIG.value, "to_dict"):
            raise ValueError("--config: the file cannot be read; give the path of an experiment, such as configs/cifar.py")
        if len(rest) > 1:
            raise ValueError(f"{rest[1]!r}: flags start with --, such as --config.bits=64")
        return rest
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        refuse(_told(arguments, error))


def _told(arguments: Sequence[str], error: Exception) -> str:
    lines = [line for line in str(error).strip().strip("'\"").replace("\\'", "'").splitlines() if line.strip("'\" ")]
    return "; ".join(line.strip() for line in lines) or type(error).__name__
