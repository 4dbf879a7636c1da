"""The hasher: codes are the signs of the logits, however the images come."""

import json
import pathlib
import re

import jax
import numpy as np
import PIL.Image
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


def test_codes_are_the_signs_of_the_logits(hasher):
    encoder = hasher.encoder
    logits = encoder.logits(hasher.params, hasher.frozen, encoder.preprocess(IMAGES))
    codes = hasher.encode(IMAGES)
    assert codes.dtype == np.uint8
    assert codes.shape == (23, 2)
    assert np.array_equal(codes, np.packbits(np.asarray(logits) > 0, axis=-1))


def test_logits_are_the_encoders(hasher):
    encoder = hasher.encoder
    expected = encoder.logits(hasher.params, hasher.frozen, encoder.preprocess(IMAGES))
    logits = hasher.logits(IMAGES)
    assert (logits.dtype, logits.shape) == (np.float32, (23, 16))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hasher.logits(list(IMAGES)), logits)
    assert hasher.logits(IMAGES[:0]).shape == (0, 16)


def test_a_sequence_of_images_of_one_size_is_encoded_as_the_array_is(hasher):
    assert np.array_equal(hasher.encode(list(IMAGES)), hasher.encode(IMAGES))


def test_images_are_resized_on_the_host_first_if_they_were_for_training(hasher):
    stored = cib.Hasher(hasher.encoder, hasher.params, hasher.frozen, stored_size=12)
    resized = [PIL.Image.fromarray(image).resize((12, 12), PIL.Image.Resampling.BILINEAR) for image in IMAGES]
    assert np.array_equal(stored.encode(IMAGES), hasher.encode(np.stack([np.asarray(image) for image in resized])))


def test_any_number_of_images(hasher):
    whole = hasher.encode(IMAGES)
    for count in (0, 1, 9, 10, 11, 20):
        assert np.array_equal(hasher.encode(IMAGES[:count]), whole[:count])


def test_a_sequence_of_uneven_images_is_resized_by_pillow(hasher):
    uneven = [np.random.default_rng(i).integers(0, 256, (9 + i, 30 - i, 3), dtype=np.uint8) for i in range(4)]
    resized = [PIL.Image.fromarray(image).resize((16, 16), PIL.Image.Resampling.BILINEAR) for image in uneven]
    assert np.array_equal(hasher.encode(uneven), hasher.encode(np.stack([np.asarray(image) for image in resized])))
    assert hasher.encode([]).shape == (0, 2)


@pytest.mark.parametrize(
    "images",
    [IMAGES.astype(np.float32), IMAGES[..., :1], IMAGES[0], IMAGES[:, :0], [IMAGES[0, ..., 0]], [IMAGES[0] / 255]],
)
def test_other_images_are_refused(hasher, images):
    with pytest.raises(ValueError, match=r"images: wanted uint8 .* in RGB, got"):
        hasher.encode(images)
    with pytest.raises(ValueError, match=r"images: wanted uint8 .* in RGB, got"):
        hasher.logits(images)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(cib.Refusal, match=r"config.json: there is no such file"):
        cib.Hasher.load(tmp_path)
    for damaged in ('{"bits": ', "[1]", "5", '{"a.b": 1}', "{}", '{"bits": "32"}'):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(cib.Refusal, match=r"config.json: the file is damaged"):
            cib.Hasher.load(tmp_path)
    with pytest.raises(cib.Refusal, match=r"is no run's folder"):
        cib.Hasher.load(tmp_path / "config.json")


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
    with pytest.raises(errors.SavedHasherError, match="a saved hasher holds all its weights"):
        cib.Hasher.load(tmp_path / "new" / "hasher", backbone_weights="vgg16.pth")
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


def test_a_damaged_hasher_is_refused(hasher, tmp_path):
    hasher.save(tmp_path)
    path = tmp_path / serialization.FILE
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        altered = bytearray(whole)
        altered[place] ^= 0x10
        path.write_bytes(altered)
        with pytest.raises(cib.Refusal, match=r"hasher.safetensors: (the file is damaged|it is of version)"):
            cib.Hasher.load(tmp_path)
    for length in (0, 10, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(errors.SavedHasherError, match="the file is damaged, or none that"):
            cib.Hasher.load(tmp_path)


def test_another_version_or_format_of_a_hasher_is_refused(hasher, tmp_path):
    hasher.save(tmp_path)
    path = tmp_path / serialization.FILE
    for head, message in (
        (
            {serialization.KEY: '{"version": 2, "checksum": ""}'},
            "it is of version 2, this package reads version 1; save it again",
        ),
        ({serialization.KEY: "[]"}, "the file is damaged"),
        ({"format": "pt"}, "the file is damaged, or none that Hasher.save wrote"),
    ):
        safetensors.numpy.save_file({"x": np.zeros(1)}, path, head)
        with pytest.raises(errors.SavedHasherError, match=message):
            cib.Hasher.load(tmp_path)


def test_places_where_no_hasher_can_be_saved_are_refused(hasher, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.SavedHasherError, match="this is a run's folder"):
        hasher.save(tmp_path)
    with pytest.raises(errors.SavedHasherError, match=r"hasher.safetensors: it cannot be written \(Not a directory"):
        hasher.save(tmp_path / "config.json" / "below")
    assert [path.name for path in pathlib.Path(tmp_path).iterdir()] == ["config.json"]


@pytest.mark.parametrize(("change", "told"), [({"novel": 3}, "config.novel"), ({"temperature": None}, "temperature")])
def test_a_run_of_another_version_is_not_called_damaged(tmp_path, change, told):
    fields = {name: value for name, value in (small.config().to_dict() | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    message = rf"config.json: it does not fit this version of cib_jax, {re.escape(cib.__version__)} \(.*{told}"
    with pytest.raises(cib.Refusal, match=message):
        cib.Hasher.load(tmp_path)
