"""A trained encoder in a folder of its own, without the run that made it: one safetensors file.

What `create_encoder` was told stands in its metadata, so that weights and config are never of two writings. A frozen
backbone's weights lie inside too: they may have come from memory, so a fingerprint would name something that nobody can
find again.
"""

import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from cib_jax import atomic
from cib_jax.encoder import Encoder, Params, create_encoder
from cib_jax.errors import Refusal
from cib_jax.views.feature_views import Standard

FILE = "hasher.safetensors"
VERSION = 1
KEY = "cib_jax.hasher"
"""Of the one entry of the metadata: of several, safetensors changes the order, and so the file, each time."""
RUN = "config.json"
"""By which a run's folder is known."""


class SavedError(Refusal):
    """A hasher cannot be saved or read; the message names the file and what to do."""


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
        raise SavedError(f"{folder}: this is a run's folder, which is loaded from its checkpoints; name another one")
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in _flat({"params": params, "frozen": frozen}).items()}
    about = {"version": VERSION, "encoder": _told(encoder, params), "settings": settings}
    head = {KEY: json.dumps(about | {"checksum": _checksum(about, tensors)}, sort_keys=True)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as own:
            safetensors.numpy.save_file(tensors, own, head)
    except (OSError, safetensors.SafetensorError) as error:  # the second is its way to say that the disk is full
        reason = getattr(error, "strerror", None) or str(error)
        raise SavedError(f"{path}: it cannot be written ({reason}); make room, or name another folder") from error


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
                raise SavedError(
                    f"{path}: it is of version {about['version']}, this package reads version {VERSION}; save it again "
                    "with this package, or load it with the one that wrote it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        if _checksum(about, tensors) != checksum:
            raise ValueError("its checksum is not that of its content")
    except SavedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise SavedError(
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
