"""A run's folder: made, claimed, and written to so that a file is there whole or not at all."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from cib_jax.config import differences, flatten
from cib_jax.errors import Refusal
from cib_jax.hasher import read_config


class WorkdirError(Refusal):
    """A workdir cannot be used; the message names it and what to do."""


def default_name(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Returns a new folder name under runs/ that tells what the run is."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return pathlib.Path("runs") / f"{config.data.name}-{config.backbone}-{config.objective}-{config.bits}bit-{now}"


@contextlib.contextmanager
def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Iterator[None]:
    """Makes `workdir` this run's own while the context lasts: creates it, or checks that its config is this one.

    Raises:
      WorkdirError: it belongs to another config, another process is at work in it, or it cannot be written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise WorkdirError(
            f"{workdir}: cannot be used as a workdir ({error.strerror}); choose another --workdir"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WorkdirError(
                f"{workdir}: another process is at work in it; wait for it to end or choose another --workdir"
            ) from None
        if (workdir / "config.json").exists():
            told = differences(flatten(config), flatten(read_config(workdir)))
            if told:
                raise WorkdirError(
                    f"{workdir}: it belongs to another config ({'; '.join(told)}); choose another --workdir, or give "
                    "the config that it was started with"
                )
        else:
            write_json(workdir / "config.json", config.to_dict())
        yield


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def write_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes a .npy file atomically."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, array)
    os.replace(part, path)
