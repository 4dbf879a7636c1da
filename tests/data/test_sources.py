"""Sources: digits against scikit-learn, TFDS against the bytes of an archive in the published layout, errors."""

import os
import pathlib

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds

from cib_jax.data import sources
from tests.data import miniature

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "tfds"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return miniature.prepare(tmp_path_factory.mktemp("tfds"))


def test_digits_are_scikit_learns():
    source = sources.load("digits")
    digits = sklearn.datasets.load_digits()
    assert source.test is None
    assert np.array_equal(source.train.labels, digits.target)
    images = np.asarray(source.train.images)
    assert images.shape == (1797, 8, 8, 3)
    assert images.dtype == np.uint8
    np.testing.assert_allclose(images[..., 0] / 255 * 16, digits.images, atol=16 / 255 / 2)
    assert np.array_equal(images[..., 0], images[..., 2])


def test_tfds_images_and_labels_are_those_of_the_archive(prepared):
    source = sources.load("cifar10", str(prepared))
    assert (len(source.train), len(source.test)) == (100, 20)
    rows = np.fromfile(prepared / "archive" / "cifar-10-batches-bin" / "test_batch.bin", np.uint8).reshape(20, -1)
    written = {row[1:].reshape(3, 32, 32).transpose(1, 2, 0).tobytes(): row[0] for row in rows}
    for index in range(20):
        image = source.test.images[index]
        assert image.shape == (32, 32, 3)
        assert written[image.tobytes()] == source.test.labels[index]


def test_taking_keeps_images_and_labels_together(prepared):
    whole = sources.load("cifar10", str(prepared)).train
    part = whole.take(np.array([7, 3, 99])).take(np.array([2, 0]))
    assert np.array_equal(part.labels, whole.labels[[99, 7]])
    assert np.array_equal(part.images[0], whole.images[99])
    assert np.array_equal(part.images[1], whole.images[7])


def test_an_unknown_name_is_refused():
    with pytest.raises(
        sources.DataError, match=r"config.data.name: 'cifarr10' is neither 'digits' nor .* did you mean cifar10"
    ):
        sources.load("cifarr10")


def test_without_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    def offline(manager, url):
        raise ConnectionError("Failed to establish a new connection")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", offline)
    with pytest.raises(sources.DataError, match=r"config.data.dir: cifar10 .* failed .*copy DIR here") as error:
        sources.load("cifar10", str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_data_set_without_labelled_images_is_refused(tmp_path, monkeypatch):
    builder = tfds.testing.DummyDataset(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    monkeypatch.setattr(tfds, "builder", lambda *arguments, **options: builder)
    with pytest.raises(sources.DataError, match=r"has features \['id'\].*choose another data set"):
        sources.load("cifar10", str(tmp_path))


def test_a_mistyped_folder_is_refused_and_nothing_is_downloaded_there(tmp_path):
    with pytest.raises(sources.DataError, match=r"config.data.dir: there is no folder .*/nowhere"):
        sources.load("cifar10", str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_data_set_prepared_in_another_format_is_refused(tmp_path):
    miniature.prepare(tmp_path, per_file=10)
    information = next(tmp_path.glob("cifar10/*/dataset_info.json"))
    information.write_text(information.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(sources.DataError, match=r"config.data.dir: .* another format than array_record"):
        sources.load("cifar10", str(tmp_path))


def test_a_truncated_file_is_named(tmp_path):
    prepared = miniature.prepare(tmp_path, per_file=10)
    file = next(prepared.glob("cifar10/*/cifar10-train.array_record*"))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(sources.DataError, match=r"config.data.dir: cifar10 under .* cannot be read"):
        sources.load("cifar10", str(tmp_path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the prepared CIFAR-10 is not here")
def test_the_real_cifar10():
    source = sources.load("cifar10", str(SHARED))
    assert np.bincount(source.train.labels).tolist() == [5000] * 10
    assert np.bincount(source.test.labels).tolist() == [1000] * 10
    assert source.train.images[49_999].shape == (32, 32, 3)
