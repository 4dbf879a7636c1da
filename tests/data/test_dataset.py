"""Sets of images: batches in the requested order, resizing, subsets, concatenation, and labels of tables."""

import csv
import os

import hypothesis
import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pytest

from cib_jax.data import dataset
from cib_jax.data.dataset import ImageSet, Unreadable
from tests.data import errors

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 4, 5, 3), dtype=np.uint8)


@hypothesis.given(st.lists(st.integers(0, 22), max_size=30), st.integers(1, 9))
@hypothesis.settings(max_examples=10, deadline=None)
def test_batches_follow_the_order(order, size):
    batches = list(dataset.stream(IMAGES, np.array(order, int), size))
    assert all(len(batch) == size for batch in batches[:-1])
    rows = np.concatenate(batches) if batches else IMAGES[:0]
    assert rows.dtype == np.uint8
    assert np.array_equal(rows, IMAGES[order])


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
    with errors.raises("config.data.stored_size", "image 1", "(9, 9, 3)"):
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


class Known:
    """Images that know their identity and resize themselves."""

    identity = "known"

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return np.full((4, 4, 3), index, np.uint8)

    def resized(self, index, size):
        return np.full((size, size, 3), 100 + index, np.uint8)


def test_subsets_and_concatenations_keep_images_labels_and_names_together():
    first = ImageSet(IMAGES, np.arange(23), [str(number) for number in range(23)])
    second = ImageSet(Known(), np.arange(100, 105), list("abcde"))
    whole = dataset.concatenate(first.take(np.array([7, 3])), second.take(np.array([4, 0, 1])))
    assert (len(whole), whole.labels.tolist(), whole.names) == (5, [7, 3, 104, 100, 101], ["7", "3", "e", "a", "b"])
    part = whole.take(np.array([3, 0]))
    assert np.array_equal(part.images[1], IMAGES[7]) and (part.images[0] == 0).all()
    assert dataset.resized(part.images, 0, 9).shape == (9, 9, 3) and (dataset.resized(part.images, 0, 2) == 100).all()
    assert np.array_equal(dataset.gather(first.take(np.arange(9, 3, -1)).images, np.array([0, 5])), IMAGES[[9, 4]])
    without = dataset.concatenate(first, ImageSet(IMAGES, None))
    assert (without.labels, without.names) == (None, None)
    assert dataset.concatenate(first) is first
    with pytest.raises(IndexError):
        whole.images[5]


def test_identity_follows_the_images_that_are_taken():
    known = ImageSet(Known(), None)
    sets = [known, known.take(np.arange(5)), known.take(np.arange(4)), dataset.concatenate(known, known)]
    assert len({dataset.identity(images.images) for images in sets}) == 4
    assert dataset.identity(known.take(np.arange(4)).images) == dataset.identity(known.take(np.arange(4)).images)
    assert dataset.identity(dataset.concatenate(known, ImageSet(IMAGES, None)).images) is None


@pytest.mark.parametrize(
    ("columns", "labels", "classes"),
    [
        ({"label": ["b", "a", "b", "c"]}, [1, 0, 1, 2], ["a", "b", "c"]),
        ({"label": ["10", "9", "10", "007"]}, [2, 1, 2, 0], ["007", "9", "10"]),
        ({"label": [10, 9, 10, 7]}, [2, 1, 2, 0], ["7", "9", "10"]),
        ({"label": ["10", "b"]}, [0, 1], ["10", "b"]),
        ({"labels": ["x|y", "", None, "y"]}, [[1, 1], [0, 0], [0, 0], [0, 1]], ["x", "y"]),
        ({"labels": [["x", "y"], [], ["z"], None]}, [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]], ["x", "y", "z"]),
        ({"labels": [[10, 9], [9]]}, [[1, 1], [1, 0]], ["9", "10"]),
        ({"labels": [10, 9, 10]}, [1, 0, 1], ["9", "10"]),
        ({"labels": [10.0, float("nan"), 9.0]}, [[0, 1], [0, 0], [1, 0]], ["9.0", "10.0"]),
        ({"labels": [["x", None], [float("nan")]]}, [[1], [0]], ["x"]),
        ({"label": [" x", "x ", "y"]}, [0, 0, 1], ["x", "y"]),
        ({"labels": ["| x ", "y |x"]}, [[1, 0], [1, 1]], ["x", "y"]),
        ({"path": ["a"]}, None, []),
    ],
)
def test_labels_of_a_table(columns, labels, classes):
    found, names = dataset.parse_labels("a.csv", columns)
    assert names == classes
    assert found is None if labels is None else found.astype(int).tolist() == labels


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ({"label": ["x", ""]}, ["row 2"]),
        ({"label": ["x", None]}, ["row 2"]),
        ({"label": ["x", "nan"]}, ["row 2"]),
        ({"label": [1.0, float("nan")]}, ["row 2"]),
        ({"label": ["x", ["y"]]}, ["row 2", "'labels'"]),
        ({"labels": ["x", {"y": 1}]}, ["row 2"]),
        ({"labels": [["x"], [["y"]]]}, ["row 2"]),
        ({"label": ["x"], "labels": ["y"]}, ["'label'", "'labels'"]),
        ({"labels": ["", None]}, ["'labels'"]),
        ({"labels": [None, None]}, ["'labels'"]),
    ],
)
def test_bad_labels_of_a_table_are_refused(columns, values):
    with errors.raises("config.data.dir", "a.csv", *values):
        dataset.parse_labels("a.csv", columns)


def test_the_list_of_unreadable_files_is_safe_in_spreadsheets_and_comes_back(tmp_path):
    """An apostrophe in front is removed again from every cell that begins with one."""
    names = [b"a.jpg", b"=1+2.jpg", b"+1", b"-1", b"@x", b"\t=1", b"\r=1", b"\n=1", b"'=1", b'caf\xe9",;\n.jpg']
    names.append("é日".encode())
    path = tmp_path / "unreadable.csv"
    dataset.write_unreadable(path, [Unreadable(os.fsdecode(name), "=bad, 0 bytes") for name in names])
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    cells = [cell for row in rows[1:] for cell in row]
    assert rows[0] == ["path", "reason"] and not any(cell[0] in "=+-@\t\r\n" for cell in cells)
    found = [cell.removeprefix("'").encode("utf-8", "surrogateescape") for cell in cells]
    assert found == [cell for name in names for cell in (name, b"=bad, 0 bytes")]
    dataset.write_unreadable(path, [])
    assert not path.exists()
    dataset.write_unreadable(path, [])
