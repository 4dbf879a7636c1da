"""Saved hashers come back bit for bit; damaged ones, other versions and folders that are not a run are rejected."""

import hashlib
import json
import os
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

import cib_jax as cib
from cib_jax import errors
from cib_jax.augment.features import standard
from cib_jax.inference import serialization
from tests import small

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def hasher():
    encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
    return cib.Hasher(encoder, params, frozen, batch_size=10)


def test_a_folder_that_is_not_a_run_is_rejected(tmp_path):
    for folder in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(errors.CheckpointError) as error:
            cib.Hasher.load(folder)
        assert error.value.field == "--workdir"
    path = tmp_path / "config.json"
    deep = ("[" * 100_000, '{"a":' * 500 + "1" + "}" * 500)
    for damaged in ('{"bits": ', "[1]", "5", '{"a.b": 1}', "{}", '{"bits": "32"}', '{"a": {"b": [{}]}}', *deep):
        path.write_text(damaged)
        with pytest.raises(errors.CheckpointError, match="damaged") as error:
            cib.Hasher.load(tmp_path)
        assert error.value.field == str(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("config.json", errors.CheckpointError), (serialization.FILE, errors.SavedHasherError)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).symlink_to(tmp_path / "pipe")
        with pytest.raises(kind):
            cib.Hasher.load(folder)


def test_no_link_is_followed_to_a_hasher(hasher, tmp_path):
    hasher.save(tmp_path / "private")
    (tmp_path / "hasher").mkdir()
    path = tmp_path / "hasher" / serialization.FILE
    path.symlink_to(tmp_path / "private" / serialization.FILE)
    with pytest.raises(errors.SavedHasherError) as error:
        cib.Hasher.load(tmp_path / "hasher")
    assert error.value.field == str(path)


def set_in(tree, path, value):
    """Sets, or for None deletes, what is under a dotted path."""
    *groups, last = path.split(".")
    for group in groups:
        tree = tree[group]
    if value is None:
        del tree[last]
    else:
        tree[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("settings", None),
        ("settings", 3),
        ("settings.devices", None),
        ("settings.other", 3),
        ("settings.batch_size", "3"),
        ("settings.batch_size", 0),
        ("settings.batch_size", -1),
        ("settings.stored_size", -1),
        ("settings.stored_size", 2**40),
        ("settings.devices", -1),
        ("encoder.feature_noise", "x"),
        ("encoder.feature_noise", float("nan")),
        ("encoder.feature_dropout", []),
        ("encoder", None),
        ("encoder", []),
        ("encoder.bits", None),
        ("encoder.bits", 2**40),
        ("encoder.bits", "16"),
        ("encoder.hidden", 2**40),
        ("encoder.hidden", {}),
        ("encoder.other", 1),
        ("encoder.backbone", "none"),
        ("encoder.backbone", "resnet50"),
        ("encoder.backbone", ["convnet"]),
        ("encoder.image_size", -1),
        ("encoder.image_size", 2**20),
        ("encoder.image_size", "16"),
        ("encoder.backbone_dtype", "text"),
        ("encoder.standard", {"mean": 1}),
    ],
)
def test_a_hasher_with_other_metadata_is_rejected(hasher, tmp_path, path, value):
    """Their checksum holds."""
    hasher.save(tmp_path)
    file = tmp_path / serialization.FILE
    with safetensors.safe_open(file, framework="np") as content:
        about = json.loads(content.metadata()[serialization.KEY])
    about.pop("checksum")
    set_in(about, path, value)
    tensors = safetensors.numpy.load_file(file)
    write_hasher(file, about, tensors)
    with pytest.raises(errors.SavedHasherError) as error:
        cib.Hasher.load(tmp_path)
    assert error.value.field == str(file) and "\n" not in str(error.value)


def write_hasher(file, about, tensors):
    """Writes the file as its format demands: the checksum is over the JSON and, in order, each tensor."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype.name} {tensor.shape}\n".encode() + tensor.tobytes())
    metadata = {serialization.KEY: json.dumps(about | {"checksum": digest.hexdigest()})}
    safetensors.numpy.save_file(tensors, file, metadata)


def test_a_hasher_with_other_tensors_is_rejected(hasher, tmp_path):
    hasher.save(tmp_path)
    file = tmp_path / serialization.FILE
    with safetensors.safe_open(file, framework="np") as content:
        about = json.loads(content.metadata()[serialization.KEY])
    about.pop("checksum")
    whole = safetensors.numpy.load_file(file)
    write_hasher(file, about, whole)
    assert np.array_equal(cib.Hasher.load(tmp_path).encode(IMAGES), hasher.encode(IMAGES))
    name = "params/head/out/kernel"
    for change in (
        {name: whole[name][:, :8].copy()},
        {name: whole[name][:5].copy()},
        {"params/head/other": np.zeros(3)},
        {f"{name}/below": np.zeros(3)},
        {"params/²": np.zeros(3)},
        {name: whole[name].astype(np.float64)},
        {name: whole[name].astype(np.int32)},
        {"params/backbone/linear/kernel": whole["params/backbone/linear/kernel"].astype(np.complex64)},
        {"other": np.zeros(3)},
    ):
        write_hasher(file, about, whole | change)
        with pytest.raises(errors.SavedHasherError):
            cib.Hasher.load(tmp_path)
    for missing in (name, "params/backbone/linear/kernel"):
        write_hasher(file, about, {other: tensor for other, tensor in whole.items() if other != missing})
        with pytest.raises(errors.SavedHasherError):
            cib.Hasher.load(tmp_path)


def same(tree, other) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


def test_a_saved_hasher_is_the_same_again(hasher, tmp_path):
    given = cib.Hasher(hasher.encoder, hasher.params, hasher.frozen, batch_size=7, stored_size=12, devices=1)
    given.save(tmp_path / "new" / "hasher")
    loaded = cib.Hasher.load(tmp_path / "new" / "hasher")
    assert (loaded.batch_size, loaded.stored_size, loaded.devices) == (7, 12, 1)
    assert same((loaded.params, loaded.frozen), (given.params, given.frozen))
    assert np.array_equal(loaded.encode(IMAGES), given.encode(IMAGES))
    with pytest.raises(errors.SavedHasherError) as error:
        cib.Hasher.load(tmp_path / "new" / "hasher", backbone_weights="vgg16.pth")
    assert error.value.field == "backbone_weights"
    given.save(tmp_path / "other")
    loaded.save(tmp_path / "new" / "hasher")  # in place of the other
    files = [folder / serialization.FILE for folder in (tmp_path / "other", tmp_path / "new" / "hasher")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [file.name for file in files[1].parent.iterdir()] == [serialization.FILE]


def test_what_fit_returns_can_be_kept(tmp_path):
    features = np.random.default_rng(1).normal(2, 3, (40, 12)).astype(np.float32)
    fitted = cib.fit(features, bits=8, backbone="none", augment="noise", hidden=16, epochs=1, batch_size=8)
    fitted.save(tmp_path)
    loaded = cib.Hasher.load(tmp_path)
    assert np.array_equal(loaded.encode(features), fitted.encode(features))
    for field in ("backbone", "bits", "image_size", "backbone_dtype", "feature_noise", "feature_dropout"):
        ours, theirs = getattr(fitted.encoder, field), getattr(loaded.encoder, field)
        # `build` is a function made anew, or not: all else of a backbone is plain.
        assert vars(ours) == vars(theirs) if field == "backbone" else ours == theirs
    assert loaded.encoder.backbone.mean == tuple(standard([features]).mean.tolist())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_backbone_is_saved_with_it(tmp_path, dtype):
    weights = cib.load_pretrained("efficientnet_lite0")
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0), backbone="efficientnet_lite0", bits=16, image_size=32, hidden=16, backbone_params=weights,
        backbone_dtype=dtype,
    )  # fmt: skip
    cib.Hasher(encoder, params, frozen).save(tmp_path)
    loaded = cib.Hasher.load(tmp_path)
    assert same((loaded.params, loaded.frozen), (params, frozen))
    assert (loaded.encoder.backbone_dtype, loaded.encoder.backbone_graph) == (dtype, encoder.backbone_graph)


def test_a_damaged_hasher_is_rejected(hasher, tmp_path):
    hasher.save(tmp_path)
    path = tmp_path / serialization.FILE
    whole = path.read_bytes()

    def rejected(content):
        path.write_bytes(content)
        with pytest.raises(errors.SavedHasherError) as error:
            cib.Hasher.load(tmp_path)
        return error.value.field == str(path)

    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        altered = bytearray(whole)
        altered[place] ^= 0x10
        assert rejected(altered)
    for length in (0, 10, len(whole) - 1):
        assert rejected(whole[:length])


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ({serialization.KEY: '{"version": 2, "checksum": ""}'}, "version 2"),
        ({serialization.KEY: "[]"}, "damaged"),
        ({"format": "pt"}, "damaged"),
    ],
)
def test_another_version_or_format_of_a_hasher_is_rejected(tmp_path, metadata, word):
    safetensors.numpy.save_file({"x": np.zeros(1)}, tmp_path / serialization.FILE, metadata)
    with pytest.raises(errors.SavedHasherError, match=word):
        cib.Hasher.load(tmp_path)


def test_no_hasher_is_saved_in_a_run_or_below_a_file(hasher, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for folder, field in (
        (tmp_path, "folder"),
        (tmp_path / "config.json" / "below", str(tmp_path / "config.json" / "below" / serialization.FILE)),
    ):
        with pytest.raises(errors.SavedHasherError) as error:
            hasher.save(folder)
        assert error.value.field == field
    assert [path.name for path in pathlib.Path(tmp_path).iterdir()] == ["config.json"]


@pytest.mark.parametrize(("change", "name"), [({"novel": 3}, "config.novel"), ({"temperature": None}, "temperature")])
def test_a_run_of_another_version_is_not_called_damaged(tmp_path, change, name):
    fields = {name: value for name, value in (small.config().to_dict() | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(errors.CheckpointError) as error:
        cib.Hasher.load(tmp_path)
    message = str(error.value)
    assert cib.__version__ in message and name in message and "damaged" not in message
