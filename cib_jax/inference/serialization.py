"""A trained encoder in a folder of its own, without the run that made it: one safetensors file.

What `create_encoder` was told stands in its metadata, so that weights and config are never of two writings. A frozen
backbone's weights lie inside too: they may have come from memory, so a fingerprint would name something that nobody can
find again."""

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
from jax.sharding import SingleDeviceSharding

from cib_jax import files
from cib_jax.augment.features import Standard
from cib_jax.config import build
from cib_jax.config.schema import ADDED, FIELDS, MAY_CHANGE, MEASURING, differences, flatten, validate
from cib_jax.errors import CheckpointError, SavedHasherError
from cib_jax.models.encoder import Encoder, Params, create_encoder
from cib_jax.training import checkpoint
from cib_jax.training.checkpoint import Checkpoints
from cib_jax.training.train_step import Progress, create_train_state
from cib_jax.version import __version__

# hashing.saved: A trained encoder in a folder of its own, without the run that made it: one safetensors file.
#
# What `create_encoder` was told stands in its metadata, so that weights and config are never of two writings. A frozen
# backbone's weights lie inside too: they may have come from memory, so a fingerprint would name something that nobody can
# find again.


FILE = "hasher.safetensors"
VERSION = 1
KEY = "cib_jax.hasher"
"""Of the one entry of the metadata: of several, safetensors changes the order, and so the file, each time."""
RUN = "config.json"
"""By which a run's folder is known."""


def is_saved(folder: pathlib.Path) -> bool:
    """Returns whether `write` wrote to this folder."""
    return (folder / FILE).exists()


def write(folder: pathlib.Path, encoder: Encoder, params: Params, frozen: Params, settings: dict[str, int]) -> None:
    """Writes the file, atomically; the folder is made if need be.

    Args:
      folder: no run's.
      encoder: of `create_encoder`.
      params: its trained parameters.
      frozen: its others.
      settings: plain JSON that `read` gives back.

    Raises:
      SavedError: the folder is a run's, or cannot be written to.
    """
    path = folder / FILE
    if (folder / RUN).exists():
        raise SavedHasherError(
            f"{folder}: this is a run's folder, which is loaded from its checkpoints; name another one"
        )
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in _flat({"params": params, "frozen": frozen}).items()}
    about = {"version": VERSION, "encoder": _told(encoder, params), "settings": settings}
    head = {KEY: json.dumps(about | {"checksum": _checksum(about, tensors)}, sort_keys=True)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as own:
            safetensors.numpy.save_file(tensors, own, head)
    except (OSError, safetensors.SafetensorError) as error:  # the second is its way to say that the disk is full
        reason = getattr(error, "strerror", None) or str(error)
        raise SavedHasherError(f"{path}: it cannot be written ({reason}); make room, or name another folder") from error


def read(folder: pathlib.Path) -> tuple[Encoder, Params, Params, dict[str, int]]:
    """Returns the encoder, its trained parameters, its others, and the settings, as they were written.

    Raises:
      SavedError: the file cannot be read, is damaged, or of another version.
    """
    path = folder / FILE
    try:
        with safetensors.safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})[KEY])
            checksum = about.pop("checksum")
            if about["version"] != VERSION:
                raise SavedHasherError(
                    f"{path}: it is of version {about['version']}, this package reads version {VERSION}; save it again "
                    "with this package, or load it with the one that wrote it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        if _checksum(about, tensors) != checksum:
            raise ValueError("its checksum is not that of its content")
    except SavedHasherError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise SavedHasherError(
            f"{path}: the file is damaged, or none that Hasher.save wrote ({error}); copy it again or train again"
        ) from error
    trees = _nested({name: jnp.asarray(tensor) for name, tensor in tensors.items()})
    params, frozen = trees["params"], trees.get("frozen", {})
    return _encoder(about["encoder"], params, frozen), params, frozen, about["settings"]


def _told(encoder: Encoder, params: Params) -> dict[str, Any]:
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


def _encoder(told: dict[str, Any], params: Params, frozen: Params) -> Encoder:
    standard = told["standard"] and Standard.from_lists(told["standard"])
    weights = params.get("backbone") or frozen.get("backbone")
    made, _, _ = create_encoder(
        jax.random.key(0),
        **told | {"standard": standard},
        frozen="backbone" in frozen,
        backbone_params=weights,
    )
    return made


def _flat(tree: Params, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _nested(flat: dict[str, Any]) -> Params:
    tree: dict = {}
    for path, leaf in flat.items():
        *groups, last = (int(name) if name.isdigit() else name for name in path.split("/"))
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = leaf
    return tree


def _checksum(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype.name} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
    return digest.hexdigest()


# hashing.restoring: What a run left, read again: its config, the parameters it is judged by, what its features were standardised with.


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config that a run was started with.

    Raises:
      CheckpointError: there is no run in `workdir`.
    """
    path, flat = workdir / "config.json", {}
    try:
        config = ml_collections.ConfigDict(json.loads(path.read_text(encoding="utf-8")))
        flat = flatten(config)
        lacking = {name: value for name, value in ADDED.items() if name not in flat}
        config = ml_collections.ConfigDict(_with(config.to_dict(), lacking))
        validate(config)
    except OSError as error:
        raise CheckpointError(
            f"{path}: there is no such file ({error.strerror}), so {workdir} is no run's folder; give the "
            "--workdir of a training run"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        if flat.keys() == FIELDS.keys() or len(flat.keys() & FIELDS.keys()) < len(FIELDS) / 2:
            damaged = f"{path}: the file is damaged ({error}); restore it from a copy or train again"
            raise CheckpointError(damaged) from None
        raise CheckpointError(
            f"{path}: it does not fit this version of cib_jax, {__version__} ({error}); take the version that "
            "the run was made with, which its results.json names, or train again in another --workdir"
        ) from None
    return config


def _with(fields: dict[str, Any], lacking: dict[str, Any]) -> dict[str, Any]:
    for name, value in lacking.items():
        group, _, field = name.rpartition(".")
        (fields.setdefault(group, {}) if group else fields)[field] = value
    return fields


def restore_best(
    workdir: pathlib.Path, params: Params, config: ml_collections.ConfigDict
) -> tuple[Params, Progress, dict[str, Any]]:
    """Returns the parameters a run is judged by, how far it came, and what its checkpoint holds beside them.

    Raises:
      CheckpointError: there is no checkpoint, it is unusable, or it was made under another config.
      PlaceError: the place of its checkpoints cannot be reached.
    """
    directory = _checkpoints_of(workdir, config)
    # On one device of this process: it may have been trained on others, which are not there now.
    device = SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: create_train_state(params, build.optimizer(config))),
    )
    with Checkpoints(directory, read_only=True) as checkpoints:
        theirs = flatten(ml_collections.ConfigDict(checkpoints.extra()["config"]))
        told = differences(flatten(config), theirs, MAY_CHANGE | MEASURING)
        if told:
            raise CheckpointError(
                f"{workdir / 'config.json'}: it is not the config of the checkpoints here ({'; '.join(told)}); put "
                "the original back"
            )
        state, progress, extra = checkpoints.restore(template)
        if progress.best_step and progress.best_step != progress.step:
            state, _, extra = checkpoints.restore(template, progress.best_step)
    return jax.tree.map(jnp.asarray, state.params), progress, extra


def read_standard(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Standard | None:
    """Returns mean and deviation of the features that a run was trained on, None if it was trained on images.

    Raises:
      CheckpointError: there is no readable checkpoint.
    """
    if config.backbone != "none":
        return None
    with Checkpoints(_checkpoints_of(workdir, config), read_only=True) as checkpoints:
        return Standard.from_lists(checkpoints.extra()["standard"])


def _checkpoints_of(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> epath.Path:
    directory = checkpoint.checkpoint_dir(config.train.checkpoint_dir, workdir)
    if not checkpoint.exists(directory):
        raise CheckpointError(f"{directory}: there is no checkpoint here; train first, with --mode=train")
    return directory


def validate_fingerprint(fingerprint: str, extra: dict[str, Any], workdir: pathlib.Path) -> None:
    """Checks that the backbone's weights are those of the run.

    Raises:
      CheckpointError: they are others, so its codes would be meaningless.
    """
    if extra.get("backbone_fingerprint", "") != fingerprint:
        raise CheckpointError(
            f"{workdir}: the run was trained on backbone weights {extra.get('backbone_fingerprint')!r}, but those "
            f"found now are {fingerprint!r}; set config.backbone_weights to the file that the run used"
        )
