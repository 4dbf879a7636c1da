"""Data sets by name: digits against scikit-learn, each kind by its own reader, and what it needs."""

import dataclasses

import numpy as np
import pytest
import sklearn.datasets

from cib_jax.data import sources
from cib_jax.data.dataset import DataConfig
from tests.data import errors, pictures


def test_digits_are_scikit_learns():
    source = sources.load(DataConfig("digits"))
    digits = sklearn.datasets.load_digits()
    assert source.test is None
    assert np.array_equal(source.train.labels, digits.target)
    images = np.asarray(source.train.images)
    assert images.shape == (1797, 8, 8, 3)
    assert images.dtype == np.uint8
    np.testing.assert_allclose(images[..., 0] / 255 * 16, digits.images, atol=16 / 255 / 2)
    assert np.array_equal(images[..., 0], images[..., 2])


@pytest.mark.parametrize("name", ["folder", "list"])
def test_photos_need_a_size(name, tmp_path):
    with errors.raises("config.data.stored_size", "got 0"):
        sources.load(DataConfig(name, str(tmp_path)), tmp_path)


def test_each_kind_is_read_with_the_fields_of_the_config(tmp_path):
    for number in range(4):
        pictures.write(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", pictures.colored(number, 4))
    folder = DataConfig("folder", str(tmp_path / "photos"), stored_size=9)
    source = sources.load(folder, tmp_path / "cache")
    assert source.train.labels.tolist() == [0, 0, 1, 1] and source.train.images[0].shape == (9, 9, 3)
    without = sources.load(dataclasses.replace(folder, labeled=False, max_megapixels=1), tmp_path / "cache")
    assert without.train.labels is None
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"photos/{'ab'[n % 2]}/{n}.png\n" for n in range(3)))
    assert (
        len(sources.load(DataConfig("list", str(tmp_path / "list.csv"), stored_size=9), tmp_path / "cache").train) == 3
    )
    np.save(tmp_path / "features.npy", np.arange(12.0).reshape(4, 3))
    assert len(sources.load(DataConfig("features", str(tmp_path / "features.npy"))).train) == 4
