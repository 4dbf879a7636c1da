"""The hasher: codes are the signs of the logits, however the images come."""

import jax
import numpy as np
import PIL.Image
import pytest

import cib_jax as cib

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
