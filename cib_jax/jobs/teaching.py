"""The teacher of a run: a run of its own in the folder teacher/, and what it says of the training images."""

import dataclasses
import pathlib

import numpy as np
from jaxtyping import Float32

from cib_jax import diffusion
from cib_jax.config import from_config
from cib_jax.devices import parallel
from cib_jax.encoder import Params
from cib_jax.hashing.hasher import Hasher
from cib_jax.jobs import features, progress
from cib_jax.jobs import workdir as workdir_lib
from cib_jax.jobs.setting import Setting
from cib_jax.training import place

FOLDER = "teacher"
COORDINATES = "coordinates.npy"


def setting_of(run: Setting) -> Setting:
    """Returns the surroundings of a run's teacher: its data and backbone, another head and objective, no validation.

    Without validation, since labels would choose its checkpoint.
    """
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        own = from_config.teacher(config)
        config.update(own.method | {"bits": own.bits, "epochs": own.epochs or config.epochs})
        config.train.checkpoint_dir = place.within(config.train.checkpoint_dir, FOLDER)
    encoder, initial, frozen, _ = from_config.encoder(config, standard=run.standard)
    return dataclasses.replace(
        run,
        config=config,
        workdir=run.workdir / FOLDER,
        splits=dataclasses.replace(run.splits, validation=None),
        encoder=encoder,
        initial=initial,
        # The run's own, so that a large network is held once.
        frozen=run.frozen or frozen,
    )


def kept(teacher: Setting) -> Float32[np.ndarray, "images dimensions"] | None:
    """Returns the coordinates that were computed earlier, None where there are none that can be read."""
    shape = (len(teacher.splits.train), teacher.config.teacher.dimensions)
    try:
        found = np.load(_path(teacher), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


def coordinates(teacher: Setting, params: Params) -> Float32[np.ndarray, "images dimensions"]:
    """Returns the diffusion coordinates of the training images under a trained teacher, and keeps them.

    Raises:
      DiffusionError: it gives no embedding of some image.
    """
    embeddings = _embeddings(teacher, params)
    walk = from_config.teacher(teacher.config).walk
    with progress.bar(teacher.console, "Neighbours", len(embeddings)) as moved:
        found = diffusion.coordinates(embeddings, **walk, on_items=lambda count: moved(count, ""))
    workdir_lib.write_array(_path(teacher), found)
    return found


def _path(teacher: Setting) -> pathlib.Path:
    return teacher.workdir / COORDINATES


def _embeddings(teacher: Setting, params: Params) -> Float32[np.ndarray, "images features"]:
    """Returns the teacher's logits of the unaugmented training images."""
    images, what = teacher.splits.train, "Encoding for the teacher"
    if teacher.features_stay:
        parts = features.plain(teacher, images, what)
        return np.concatenate([features.logits_of_features(teacher, params, part) for part in parts])
    hasher = Hasher(teacher.encoder, params, teacher.frozen, devices=parallel.size(teacher.mesh))
    size = min(teacher.config.encode_batch, len(images))
    with progress.bar(teacher.console, what, len(images)) as moved:
        return hasher.logits_of_batches(teacher.batches(images), lambda count: moved(count, ""), size=size)
