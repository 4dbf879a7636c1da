"""The loader: batches in the order asked for, from memory or through Grain."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pytest

from cib_jax.data import dataset
from cib_jax.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 4, 5, 3), dtype=np.uint8)


@hypothesis.given(st.lists(st.integers(0, 22), max_size=30), st.integers(1, 9), st.booleans())
@hypothesis.settings(max_examples=15)
def test_batches_follow_the_order(order, size, drop):
    batches = list(dataset.stream(IMAGES, np.array(order, int), size, drop_remainder=drop))
    kept = len(order) // size * size if drop else len(order)
    assert all(len(batch) == size for batch in batches[:-1])
    rows = np.concatenate(batches) if batches else IMAGES[:0]
    assert rows.dtype == np.uint8
    assert np.array_equal(rows, IMAGES[order[:kept]])


def test_an_epochs_order_is_a_permutation_of_its_own():
    first, again, other = (dataset.epoch_order(seed, epoch, 100) for seed, epoch in ((0, 1), (0, 1), (0, 2)))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert sorted(first) == list(range(100))


class Uneven:
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return np.full((8 + index, 9, 3), index * 10, np.uint8)


def test_uneven_images_are_refused_or_resized_on_the_host():
    with pytest.raises(DataError, match=r"config.data.stored_size: image 1 has shape \(9, 9, 3\)"):
        list(dataset.stream(Uneven(), np.arange(6), 2))
    images = dataset.materialize(Uneven(), stored_size=7)
    assert images.shape == (6, 7, 7, 3)
    assert images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]


def test_resizing_on_the_host_is_pillows():
    expected = np.stack(
        [np.asarray(PIL.Image.fromarray(image).resize((3, 3), PIL.Image.Resampling.BILINEAR)) for image in IMAGES]
    )
    assert np.array_equal(dataset.materialize(IMAGES, stored_size=3), expected)


def test_size_in_bytes_is_that_of_the_array():
    assert dataset.size_in_bytes(IMAGES) == IMAGES.nbytes
    assert dataset.size_in_bytes(Uneven(), stored_size=7) == 6 * 7 * 7 * 3
