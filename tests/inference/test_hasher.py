"""The hasher: codes are the signs of the logits, however the images come; photos on disk, encoded in one call."""

import errno

import jax
import numpy as np
import PIL.Image
import pytest

import cib_jax as cib
from cib_jax import errors
from cib_jax.data import photos
from cib_jax.files import count
from cib_jax.models.encoder import plain_features, quantize
from tests.commands import indexing

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def hasher():
    encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
    return cib.Hasher(encoder, params, frozen, batch_size=10)


@pytest.fixture(scope="module")
def logits(hasher):
    """The logits of the encoder."""
    encoder = hasher.encoder
    return jax.jit(lambda images: encoder.logits(hasher.params, hasher.frozen, encoder.preprocess(images)))(IMAGES)


def test_codes_are_the_signs_of_the_logits(hasher, logits):
    codes = hasher.encode(IMAGES)
    assert codes.dtype == np.uint8
    assert codes.shape == (23, 2)
    assert np.array_equal(codes, np.packbits(np.asarray(logits) > 0, axis=-1))


def test_logits_are_the_encoders(hasher, logits):
    found = hasher.logits(IMAGES)
    assert (found.dtype, found.shape) == (np.float32, (23, 16))
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hasher.logits(list(IMAGES)), found)
    assert hasher.logits(IMAGES[:0]).shape == (0, 16)


@pytest.mark.parametrize("bits", [1, 8, 13, 16])
def test_the_first_bits_are_those_of_the_whole_codes(hasher, tmp_path, bits):
    """A cut hasher computes them by a narrower product, and is saved and loaded as any other."""
    expected = np.packbits(np.unpackbits(hasher.encode(IMAGES), axis=1)[:, :bits], axis=1)
    np.testing.assert_array_equal(hasher.encode(IMAGES, bits=bits), expected)
    cut = hasher.cut(bits)
    assert cut.encoder.bits == bits
    np.testing.assert_allclose(cut.logits(IMAGES), hasher.logits(IMAGES)[:, :bits], rtol=1e-5, atol=1e-6)
    cut.save(tmp_path / "short")
    np.testing.assert_array_equal(cib.Hasher.load(tmp_path / "short").encode(IMAGES), cut.encode(IMAGES))


@pytest.mark.parametrize("bits", [0, 17])
def test_codes_are_not_cut_to_more_bits_than_they_have(hasher, bits):
    for cut in (hasher.cut, lambda bits: hasher.encode(IMAGES, bits=bits)):
        with pytest.raises(errors.ConfigError) as caught:
            cut(bits)
        assert caught.value.field == "bits"


def test_a_sequence_of_images_of_one_size_is_encoded_as_the_array_is(hasher):
    assert np.array_equal(hasher.encode(list(IMAGES)), hasher.encode(IMAGES))


def test_images_are_resized_on_the_host_first_if_they_were_for_training(hasher):
    stored = cib.Hasher(hasher.encoder, hasher.params, hasher.frozen, stored_size=12)
    resized = [PIL.Image.fromarray(image).resize((12, 12), PIL.Image.Resampling.BILINEAR) for image in IMAGES]
    assert np.array_equal(stored.encode(IMAGES), hasher.encode(np.stack([np.asarray(image) for image in resized])))


def test_any_number_of_images(hasher):
    whole = hasher.encode(IMAGES)
    for some in (0, 1, 9, 10, 11, 20):
        assert np.array_equal(hasher.encode(IMAGES[:some]), whole[:some])


def test_a_sequence_of_uneven_images_is_resized_by_pillow(hasher):
    uneven = [np.random.default_rng(i).integers(0, 256, (9 + i, 30 - i, 3), dtype=np.uint8) for i in range(4)]
    resized = [PIL.Image.fromarray(image).resize((16, 16), PIL.Image.Resampling.BILINEAR) for image in uneven]
    assert np.array_equal(hasher.encode(uneven), hasher.encode(np.stack([np.asarray(image) for image in resized])))
    assert hasher.encode([]).shape == (0, 2)


@pytest.mark.parametrize(
    "images",
    [IMAGES.astype(np.float32), IMAGES[..., :1], IMAGES[0], IMAGES[:, :0], [IMAGES[0, ..., 0]], [IMAGES[0] / 255]],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_other_images_are_rejected(hasher, images):
    for function in (hasher.encode, hasher.logits):
        with pytest.raises(errors.UserError) as error:
            function(images)
        assert error.value.field == "images"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    indexing.save_hasher(folder / "encoder")
    indexing.fill(folder / "photos", 7)
    (folder / "photos" / "a" / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def photo_hasher(folder):
    return cib.Hasher.load(folder / "encoder")


def test_a_folder_a_photo_and_several_photos_are_encoded(folder, photo_hasher):
    """Against one photo after the other."""
    listed = sorted(str(path) for path in (folder / "photos").rglob("*.*"))
    good = [path for path in listed if "broken" not in path]
    codes = np.concatenate([photo_hasher.encode(photos.decode(path, photo_hasher.side)[None]) for path in good])
    bad = [str(folder / "photos" / "a" / "broken.jpg")]
    for given, chosen, unreadable in (
        (folder / "photos", slice(None), bad),
        (listed[::-1], slice(None, None, -1), bad),
        (good[2], slice(2, 3), []),
        ([], slice(0), []),
    ):
        encoded = cib.encode_photos(photo_hasher, given)
        assert encoded.paths == good[chosen] and [path for path, _ in encoded.unreadable] == unreadable
        assert all(reason for _, reason in encoded.unreadable)
        np.testing.assert_array_equal(encoded.codes, codes[chosen])
        assert f"({count(len(encoded.paths), 'photo')} →" in str(encoded)


def test_errors_of_photos_name_the_argument(folder, photo_hasher, monkeypatch):
    with pytest.raises(errors.DataError, match=r"^photos: .*nowhere"):
        cib.encode_photos(photo_hasher, folder / "nowhere")

    def decode(path, size, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(photos, "decode", decode)
    with pytest.raises(errors.DataError, match=r"^photos: .*input/output error"):
        cib.encode_photos(photo_hasher, folder / "photos")


def test_features_are_those_of_the_backbone_in_127_steps():
    made = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=12, image_size=16, hidden=16)
    hasher = cib.Hasher(*made, batch_size=4)
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    exact = np.asarray(plain_features(*made, images), np.float64)
    expected = 127 * exact / np.abs(exact).max(axis=1, keepdims=True)
    found = hasher.features(images)
    assert found.dtype == np.int8 and np.abs(found - expected).max() <= 0.51
    codes, features = hasher.encode_with_features([images[:4], images[4:]], size=4)
    assert np.array_equal(codes, hasher.encode(images)) and np.abs(features - expected).max() <= 0.51
    assert hasher.features(images[:0]).shape == (0, exact.shape[1])
    none = hasher.encode_with_features([], size=4)
    assert [part.shape for part in none] == [(0, 2), (0, exact.shape[1])]
    assert not quantize(np.zeros((1, 3), np.float32)).any()
