"""Saved encoders and finished runs: writing and reading hasher.safetensors, loading a run's config and parameters.

A saved encoder is one safetensors file. The arguments of `create_encoder` are in its metadata, so that weights and
config cannot come from different writings. The weights of a frozen backbone are inside too: they may never have been in
a file, so that a fingerprint could name something that cannot be found again.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from cib_jax import files
from cib_jax.augment.features import Standard
from cib_jax.config import build, flatten, own_fields
from cib_jax.config.extensions import BUILT_IN
from cib_jax.config.schema import (
    ADDED,
    FIELDS,
    MAY_CHANGE,
    MEASURING,
    RULES,
    absent_extensions,
    differences,
    load_remedy,
    validate,
)
from cib_jax.errors import CheckpointError, ConfigError, SavedHasherError
from cib_jax.models.encoder import DTYPES, Encoder, Params, create_encoder
from cib_jax.training.train_step import Progress, create_train_state
from cib_jax.version import __version__

FILE = "hasher.safetensors"
VERSION = 1
KEY = "cib_jax.hasher"  # the only metadata entry: safetensors writes several in random order
SETTINGS = {"batch_size": range(1, 2**31), "stored_size": range(2**15), "devices": range(2**31)}
"""Fields of a hasher beside its encoder, with their values."""
NOISES = ("feature_noise", "feature_dropout")
RUN = "config.json"  # by which the folder of a run is recognized


# Saved encoders.


def write(folder: pathlib.Path, encoder: Encoder, params: Params, frozen: Params, settings: dict[str, int]) -> None:
    """Writes an encoder to a folder, which is created if needed; an existing file is replaced in one step."""
    path = folder / FILE
    if (folder / RUN).exists():
        raise SavedHasherError(
            f"folder must not be that of a run, which is loaded from its checkpoints, got {folder}; name another one",
            field="folder",
        )
    flat = traverse_util.flatten_dict({"params": params, "frozen": frozen})
    tensors = {"/".join(map(str, names)): np.ascontiguousarray(leaf) for names, leaf in flat.items()}
    about = {"version": VERSION, "encoder": _encoder_arguments(encoder, params), "settings": settings}
    if encoder.backbone.name not in BUILT_IN["backbone"]:
        about["extensions"] = own_fields.get("extensions", "")
    metadata = {KEY: json.dumps(about | {"checksum": _checksum(about, tensors)}, sort_keys=True)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as part:
            safetensors.numpy.save_file(tensors, part, metadata)
    except (OSError, safetensors.SafetensorError) as error:  # the latter if the disk is full
        reason = getattr(error, "strerror", None) or str(error)
        raise _error(path, f"cannot be written ({reason}); free some space, or name another folder") from error


def read(folder: pathlib.Path) -> tuple[Encoder, Params, Params, dict[str, int]]:
    """Returns a saved encoder, its trained parameters, its other parameters, and the settings."""
    path = folder / FILE
    try:
        # The link or pipe of somebody else would be followed or waited for.
        with files.open_regular(path, links=False), safetensors.safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})[KEY])
            checksum = about.pop("checksum")
            if about["version"] != VERSION:
                raise _error(
                    path,
                    f"must be of version {VERSION}, got version {about['version']}; save it again with this version of "
                    "cib_jax, or load it with the version that saved it",
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if _checksum(about, tensors) != checksum:
            raise ValueError("its checksum is not that of its content")
        if not RULES["backbone"][0](name := about["encoder"]["backbone"]) and (file := about.get("extensions")):
            raise _error(path, f"needs the backbone {name!r} of {file}, which is not loaded; {load_remedy(file)}")
        return *_rebuild(about, tensors), about["settings"]
    except (SavedHasherError, MemoryError):
        raise
    except Exception as error:  # damaged content makes safetensors, JSON, Flax and JAX raise errors of many types
        fault = (
            f"is damaged, or was not written by Hasher.save ({files.first_line(error)}); copy it again or train again"
        )
        if isinstance(error, ConfigError) and error.field == "backbone":
            fault = f"may have a backbone of a user's own, whose file must be imported first ({error})"
        raise _error(path, fault) from error


def _rebuild(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> tuple[Encoder, Params, Params]:
    """Returns the encoder, its trained parameters and its other parameters; raises any error for damaged content."""
    trees = traverse_util.unflatten_dict(
        {
            # `jnp.asarray` would compile a program for each shape.
            tuple(int(part) if part.isdigit() else part for part in name.split("/")): jax.device_put(tensor)
            for name, tensor in tensors.items()
        }
    )
    params, frozen, arguments = trees["params"], trees.get("frozen", {}), about["encoder"]
    for name, tensor in tensors.items():
        # A user's own network may have parameters of other types.
        own = "/backbone/" in name and arguments["backbone"] not in BUILT_IN["backbone"]
        if not own and tensor.dtype not in (np.float32, DTYPES[arguments["backbone_dtype"]]):
            raise ValueError(f"its tensor {name} is of type {tensor.dtype}")
    if arguments["image_size"] not in SETTINGS["stored_size"]:
        raise ValueError("its images are too large")
    head = {"hidden": arguments["hidden"], "out": arguments["bits"]}
    if not trees.keys() <= {"params", "frozen"}:
        raise ValueError("it holds other tensors")
    if {layer: params["head"][layer]["kernel"].shape[1] for layer in head} != head:  # before memory for them is taken
        raise ValueError("its head has another shape")
    settings = about["settings"]
    if settings.keys() != SETTINGS.keys() or not all(
        type(settings[name]) is int and settings[name] in allowed for name, allowed in SETTINGS.items()
    ):
        raise ValueError("its settings are not those of a hasher")
    if not all(type(arguments[name]) in (int, float) and 0 <= arguments[name] < math.inf for name in NOISES):
        raise ValueError("its noise or dropout of features is not a number of 0 or more")
    encoder, *expected = create_encoder(
        jax.random.key(0),  # for parameters that are not used
        **arguments | {"standard": arguments["standard"] and Standard.from_lists(arguments["standard"])},
        frozen="backbone" in frozen,
        backbone_params=params.get("backbone") or frozen.get("backbone"),
    )
    if jax.tree.map(jnp.shape, [params, frozen]) != jax.tree.map(jnp.shape, expected):
        raise ValueError("its tensors are not those of its network")
    return encoder, params, frozen


def _error(path: pathlib.Path, fault: str) -> SavedHasherError:
    return SavedHasherError(f"{path} {fault}", field=str(path))


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


def _checksum(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype.name} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
    return digest.hexdigest()


# Finished runs. Orbax, which reads their checkpoints, is imported only there: a search opens a saved encoder.


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config of the run in `workdir`; raises `CheckpointError` without one for this version."""
    path, flat = workdir / RUN, {}
    try:
        flat = flatten(ml_collections.ConfigDict(files.read_json(path)))
        # Runs of earlier versions lack some fields.
        config = ml_collections.ConfigDict(traverse_util.unflatten_dict(ADDED | flat, sep="."))
        validate(config, trained=True)
    except OSError as error:
        got = f"{workdir} without config.json ({error.strerror})"
        if (workdir / FILE).exists():
            got = f"{workdir}, a saved hasher; use it in Python, such as by cib_jax.encode_photos, or for --mode=index"
        problem = f"--workdir must be the folder of a training run, got {got}"
        raise CheckpointError(problem, field="--workdir") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        if flat and absent_extensions(config):
            raise CheckpointError(f"{path}: {error}", field=str(path)) from None
        if flat.keys() == FIELDS.keys() or len(flat.keys() & FIELDS.keys()) < len(FIELDS) / 2:
            fault = f"is damaged ({error}); restore it from a copy or train again"
        else:
            fault = (
                f"does not fit this version of cib_jax, {__version__} ({error}); use the version of the run, which its "
                "results.json names, or train again in another --workdir"
            )
        raise CheckpointError(f"{path} {fault}", field=str(path)) from None
    return config


def restore_best(
    workdir: pathlib.Path, params: Params, config: ml_collections.ConfigDict
) -> tuple[Params, Progress, dict[str, Any]]:
    """Returns a run's parameters, its progress, and the other contents of its checkpoint.

    The parameters, of the structure and shapes of `params`, are those of the best checkpoint if the run was validated,
    of the last one otherwise. `CheckpointError` is raised if there is none that can be used under this config.
    """
    from cib_jax.training.checkpoint import Checkpoints

    directory = _checkpoint_dir(workdir, config)
    # Restored to one device of this process: the devices of the training may not exist here.
    device = SingleDeviceSharding(jax.local_devices()[0])
    known = RULES["optimizer"][0](config.optimizer)  # or one of a file that has not been run
    optimizer = build.optimizer(config) if known else optax.identity()
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: create_train_state(params, optimizer)),
    )
    if not known:
        template = dataclasses.replace(template, opt_state=None)
    with Checkpoints(directory, read_only=True) as checkpoints:
        saved = checkpoints.entry("config", lambda config: flatten(ml_collections.ConfigDict(config)))
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
    """Returns mean and deviation of the features on which a run was trained, None for a run on images."""
    if config.backbone != "none":
        return None
    from cib_jax.training.checkpoint import Checkpoints

    with Checkpoints(_checkpoint_dir(workdir, config), read_only=True) as checkpoints:
        return checkpoints.entry("standard", Standard.from_lists)


def _checkpoint_dir(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> epath.Path:
    from cib_jax.training import checkpoint

    directory = checkpoint.checkpoint_dir(config.train.checkpoint_dir, workdir)
    if not checkpoint.exists(directory):
        raise CheckpointError(
            f"--workdir must hold a trained run, but {directory} has no checkpoint; train first, with --mode=train",
            field="--workdir",
        )
    return directory


def validate_fingerprint(fingerprint: str, extra: dict[str, Any], workdir: pathlib.Path) -> None:
    """Raises `CheckpointError` unless the weights are those of the run; with others, its codes would be meaningless."""
    if (expected := extra.get("backbone_fingerprint", "")) != fingerprint:
        raise CheckpointError(
            f"config.backbone_weights must be the file with which {workdir} was trained, of fingerprint {expected!r}, "
            f"got {fingerprint!r}",
            field="config.backbone_weights",
        )
