"""Saved encoders and finished runs: writing and reading hasher.safetensors, loading a run's config and parameters.

A saved encoder is one safetensors file. The arguments of `create_encoder` are in its metadata, so that weights and
config cannot come from different writings. The weights of a frozen backbone are inside too: they may never have been in
a file, so that a fingerprint could name something that cannot be found again.
"""

import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from cib_jax import files
from cib_jax.augment.features import Standard
from cib_jax.config import build, flatten
from cib_jax.config.schema import ADDED, FIELDS, MAY_CHANGE, MEASURING, differences, validate
from cib_jax.errors import CheckpointError, SavedHasherError
from cib_jax.models.encoder import Encoder, Params, create_encoder
from cib_jax.training import checkpoint
from cib_jax.training.checkpoint import Checkpoints
from cib_jax.training.train_step import Progress, create_train_state
from cib_jax.version import __version__

FILE = "hasher.safetensors"
VERSION = 1
KEY = "cib_jax.hasher"
"""Key of the only metadata entry; safetensors writes several in random order, and so a different file each time."""
RUN = "config.json"
"""File by which the folder of a run is recognized."""


# Saved encoders.


def is_saved(folder: pathlib.Path) -> bool:
    """Returns whether `folder` holds a saved encoder."""
    return (folder / FILE).exists()


def write(folder: pathlib.Path, encoder: Encoder, params: Params, frozen: Params, settings: dict[str, int]) -> None:
    """Writes an encoder to a folder, which is created if needed; an existing file is replaced in one step.

    Args:
      folder: Folder of the encoder; must not be that of a run.
      encoder: Encoder from `create_encoder`.
      params: Trained parameters.
      frozen: Other parameters.
      settings: JSON values that `read` returns.

    Raises:
      SavedHasherError: The folder is that of a run, or cannot be written.
    """
    path = folder / FILE
    if (folder / RUN).exists():
        raise SavedHasherError(
            f"folder must not be that of a run, which is loaded from its checkpoints, got {folder}; name another one",
            field="folder",
        )
    flat = traverse_util.flatten_dict({"params": params, "frozen": frozen})
    tensors = {"/".join(map(str, names)): np.ascontiguousarray(leaf) for names, leaf in flat.items()}
    about = {"version": VERSION, "encoder": _encoder_arguments(encoder, params), "settings": settings}
    metadata = {KEY: json.dumps(about | {"checksum": _checksum(about, tensors)}, sort_keys=True)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as part:
            safetensors.numpy.save_file(tensors, part, metadata)
    except (OSError, safetensors.SafetensorError) as error:  # the latter if the disk is full
        reason = getattr(error, "strerror", None) or str(error)
        raise SavedHasherError(
            f"{path} cannot be written ({reason}); free some space, or name another folder", field=str(path)
        ) from error


def read(folder: pathlib.Path) -> tuple[Encoder, Params, Params, dict[str, int]]:
    """Returns a saved encoder, its trained parameters, its other parameters, and the settings.

    Raises:
      SavedHasherError: The file cannot be read, is damaged, or of another version.
    """
    path = folder / FILE
    try:
        with safetensors.safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})[KEY])
            checksum = about.pop("checksum")
            if about["version"] != VERSION:
                raise SavedHasherError(
                    f"{path} must be of version {VERSION}, got version {about['version']}; save it again with this "
                    "version of cib_jax, or load it with the version that saved it",
                    field=str(path),
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if _checksum(about, tensors) != checksum:
            raise ValueError("its checksum is not that of its content")
    except SavedHasherError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise SavedHasherError(
            f"{path} is damaged, or was not written by Hasher.save ({error}); copy it again or train again",
            field=str(path),
        ) from error
    trees = traverse_util.unflatten_dict(
        {
            tuple(int(part) if part.isdigit() else part for part in name.split("/")): jnp.asarray(tensor)
            for name, tensor in tensors.items()
        }
    )
    params, frozen = trees["params"], trees.get("frozen", {})
    return _create_encoder(about["encoder"], params, frozen), params, frozen, about["settings"]


def _encoder_arguments(encoder: Encoder, params: Params) -> dict[str, Any]:
    """Returns the arguments of `create_encoder` as JSON can represent them."""
    backbone = encoder.backbone
    standard = None
    if backbone.takes == "features":
        standard = Standard(np.array(backbone.mean, np.float32), np.array(backbone.deviation, np.float32)).to_lists()
    return {
        "backbone": backbone.name,
        "bits": encoder.bits,
        "image_size": encoder.image_size,
        "hidden": params["head"]["hidden"]["kernel"].shape[1],
        "backbone_dtype": encoder.backbone_dtype,
        "standard": standard,
        "feature_noise": encoder.feature_noise,
        "feature_dropout": encoder.feature_dropout,
    }


def _create_encoder(arguments: dict[str, Any], params: Params, frozen: Params) -> Encoder:
    standard = arguments["standard"] and Standard.from_lists(arguments["standard"])
    encoder, _, _ = create_encoder(
        jax.random.key(0),  # for parameters that are not used
        **arguments | {"standard": standard},
        frozen="backbone" in frozen,
        backbone_params=params.get("backbone") or frozen.get("backbone"),
    )
    return encoder


def _checksum(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype.name} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
    return digest.hexdigest()


# Finished runs.


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config of the run in `workdir`.

    Raises:
      CheckpointError: There is no run in `workdir`, or its config is damaged or of another version.
    """
    path, flat = workdir / RUN, {}
    try:
        flat = flatten(ml_collections.ConfigDict(json.loads(path.read_text(encoding="utf-8"))))
        # Runs of earlier versions lack some fields.
        config = ml_collections.ConfigDict(traverse_util.unflatten_dict(ADDED | flat, sep="."))
        validate(config)
    except OSError as error:
        raise CheckpointError(
            f"--workdir must be the folder of a training run, got {workdir} without config.json ({error.strerror})",
            field="--workdir",
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        if flat.keys() == FIELDS.keys() or len(flat.keys() & FIELDS.keys()) < len(FIELDS) / 2:
            raise CheckpointError(
                f"{path} is damaged ({error}); restore it from a copy or train again", field=str(path)
            ) from None
        raise CheckpointError(
            f"{path} does not fit this version of cib_jax, {__version__} ({error}); use the version of the run, which "
            "its results.json names, or train again in another --workdir",
            field=str(path),
        ) from None
    return config


def restore_best(
    workdir: pathlib.Path, params: Params, config: ml_collections.ConfigDict
) -> tuple[Params, Progress, dict[str, Any]]:
    """Returns a run's parameters, its progress, and the other contents of its checkpoint.

    The parameters are those of the best checkpoint if the run was validated, of the last one otherwise.

    Args:
      workdir: Folder of the run.
      params: Parameters of the same structure and shapes.
      config: Config of the run.

    Raises:
      CheckpointError: There is no checkpoint, it is unusable, was made under another config, or cannot be reached.
    """
    directory = _checkpoint_dir(workdir, config)
    # Restored to one device of this process: the devices of the training may not exist here.
    device = SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: create_train_state(params, build.optimizer(config))),
    )
    with Checkpoints(directory, read_only=True) as checkpoints:
        saved = flatten(ml_collections.ConfigDict(checkpoints.extra()["config"]))
        if changes := differences(flatten(config), saved, MAY_CHANGE | MEASURING):
            raise CheckpointError(
                f"{workdir / RUN} must be the config of the run's checkpoints, but differs from it "
                f"({'; '.join(changes)}); restore the original",
                field=str(workdir / RUN),
            )
        state, progress, extra = checkpoints.restore(template)
        if progress.best_step and progress.best_step != progress.step:
            state, _, extra = checkpoints.restore(template, progress.best_step)
    return jax.tree.map(jnp.asarray, state.params), progress, extra


def read_standard(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Standard | None:
    """Returns mean and deviation of the features on which a run was trained, None for a run on images.

    Raises:
      CheckpointError: There is no readable checkpoint.
    """
    if config.backbone != "none":
        return None
    with Checkpoints(_checkpoint_dir(workdir, config), read_only=True) as checkpoints:
        return Standard.from_lists(checkpoints.extra()["standard"])


def _checkpoint_dir(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> epath.Path:
    directory = checkpoint.checkpoint_dir(config.train.checkpoint_dir, workdir)
    if not checkpoint.exists(directory):
        raise CheckpointError(
            f"--workdir must hold a trained run, but {directory} has no checkpoint; train first, with --mode=train",
            field="--workdir",
        )
    return directory


def validate_fingerprint(fingerprint: str, extra: dict[str, Any], workdir: pathlib.Path) -> None:
    """Checks that the backbone's weights are those of the run; with others, its codes would be meaningless.

    Raises:
      CheckpointError: The weights differ.
    """
    if extra.get("backbone_fingerprint", "") != fingerprint:
        raise CheckpointError(
            f"config.backbone_weights must be the file with which {workdir} was trained, of fingerprint "
            f"{extra.get('backbone_fingerprint')!r}, got {fingerprint!r}",
            field="config.backbone_weights",
        )
