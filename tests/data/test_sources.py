"""Sources by name: digits against scikit-learn, and what each kind needs."""

import numpy as np
import pytest
import sklearn.datasets

from cib_jax.data import sources
from cib_jax.errors import DataError


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


@pytest.mark.parametrize("name", ["folder", "list"])
def test_photos_want_a_size(name, tmp_path):
    with pytest.raises(DataError, match=r"config.data.stored_size: photos of a folder or a list .* such as 160"):
        sources.load(name, str(tmp_path), prepared=tmp_path)
