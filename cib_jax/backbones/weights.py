"""Pretrained weights: reads a file without running anything in it, checks it, gives plain arrays.

What a file is, its content decides: a .pth that is a safetensors file inside is read as one. `sources` says where the
published ones lie.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import safetensors

from cib_jax.backbones import registry, sources, torch_format
from cib_jax.backbones.sources import Source, WeightsError
from cib_jax.backbones.tensors import MismatchError, Tree
from cib_jax.backbones.torch_pickle import FormatError


def load_pretrained(backbone_name: str, path: str = "") -> Tree:
    """Returns the pretrained state of a backbone as nested dicts of float32 arrays.

    Args:
        backbone_name: a name of `registry.BACKBONES`.
        path: a .safetensors, .pth or .pt file; "" takes the published weights, from where `sources` says.

    Raises:
        WeightsError: if the file is absent, damaged, unsafe, another network's or not finite.
        ValueError: if there is no such backbone, or if it is one that is trained from scratch.

    Examples:
      >>> import cib_jax as cib
      >>> import jax
      >>> params = cib.load_pretrained("efficientnet_lite0")
      >>> round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6, 2)  # millions
      3.35
    """
    backbone = registry.get(backbone_name)
    if backbone.convert is None:
        raise ValueError(f"backbone {backbone_name!r} is trained from scratch: it has no pretrained weights to load.")
    source = sources.given(path) if path else sources.locate(backbone_name)
    _verify_hash(source)
    tensors = read_tensors(source.path, source.remedy, backbone.reads)
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


def read_tensors(
    path: str | os.PathLike[str], remedy: str = "give another file", prefixes: Sequence[str] = ("",)
) -> dict[str, np.ndarray]:
    """Returns the named tensors of a safetensors file or of a torch file that holds a state-dict.

    No code in the file is run and nothing that it names is imported: see `torch_format`.

    Args:
        path: the file; its content, not its ending, decides how it is read.
        remedy: what the error tells the reader to do.
        prefixes: tensors whose names begin with none of these are left out, their numbers unread.

    Raises:
        WeightsError: if the file is absent, cut short, corrupt, malicious or of another kind.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
            if start.startswith(torch_format.ZIP_START):
                return torch_format.read_zip(file, prefixes)
            if start.startswith(torch_format.LEGACY_START):
                return torch_format.read_legacy(file, prefixes)
        if len(start) > 8 and start[8:9] == b"{":
            with safetensors.safe_open(path, framework="np") as tensors:
                names = [name for name in tensors.keys() if name.startswith(tuple(prefixes))]  # noqa: SIM118 - no dict
                return {name: tensors.get_tensor(name) for name in names}
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
