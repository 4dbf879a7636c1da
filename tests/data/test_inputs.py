"""Inputs of encoding: folders, lists and feature files, read in order, with a reason for each item without content."""

import errno
import os
import shutil

import numpy as np
import pytest

from cib_jax.data import inputs, photos
from cib_jax.errors import DataError
from tests.data import errors, pictures


@pytest.fixture
def root(tmp_path):
    for number in range(4):
        pictures.write(tmp_path / "photos" / f"{number}.png", pictures.colored(number, 4))
    (tmp_path / "photos" / "2.png").write_bytes(b"")
    (tmp_path / "photos" / "notes.txt").write_text("x")
    return tmp_path / "photos"


def load(place, takes="images", size=8):
    return inputs.load_inputs(str(place), takes=takes, size=size)


def test_photos_of_a_folder_are_read_in_the_order_of_the_ranges(root):
    found = load(root)
    assert (found.place, found.names, found.noun) == (str(root), [f"{n}.png" for n in range(4)], "photo")
    assert len(found.notes) == 1 and "1 .txt" in found.notes[0]
    results = dict(found.read([range(1, 3), range(0, 1)]))
    assert list(results) == [1, 2, 0]
    assert np.array_equal(results[1].content, photos.decode(root / "1.png", 8)) and results[1].decoded is None
    assert (results[1].size, results[1].modified_ns) == ((s := os.stat(root / "1.png")).st_size, s.st_mtime_ns)
    assert (results[2].content, results[2].reason, results[2].transient) == (None, "0 bytes", False)


def test_excluded_photos_are_left_out(root):
    found = inputs.load_inputs(str(root), takes="images", size=8, exclude=["[13].png"])
    assert found.names == ["0.png", "2.png"]
    with errors.raises("--images", root):
        inputs.load_inputs(str(root), takes="images", size=8, exclude=["*.png"])


def test_photos_of_a_list_are_sorted_and_may_have_thumbnails(root):
    (root / "list.csv").write_text("path\n3.png\n0.png\n")
    found = load(root / "list.csv")
    assert found.names == ["0.png", "3.png"] and found.root == str(root)
    (root / "more.csv").write_text("path\n3.png\n0.png\na/1.png\nb/a/2.png\n")
    left = inputs.load_inputs(str(root / "more.csv"), takes="images", size=8, exclude=["3.*", "a"])
    assert left.names == ["0.png"]
    with errors.raises("--images", "more.csv"):
        inputs.load_inputs(str(root / "more.csv"), takes="images", size=8, exclude=["*.png"])
    again = inputs.load_listed_photos(str(root / "list.csv"), found.names, size=8)
    assert again.names == found.names and again.root == str(root)
    thumbnails = inputs.Photos(str(root), ["0.png"], str(root), 8, thumbnails=True)
    ((_, read),) = thumbnails.read([[0]])
    expected = photos.decode_with_thumbnail(root / "0.png", 8)
    assert np.array_equal(read.content, expected.square) and read.decoded.thumbnail == expected.thumbnail


def test_a_name_that_no_file_can_have_has_a_reason(root):
    (root / "list.csv").write_bytes(b"path\n0.png\nx\0.png\n")
    results = dict(load(root / "list.csv").read([range(2)]))
    assert results[0].content is not None and (results[1].content, results[1].reason) == (None, "embedded null byte")


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e39])
def test_rows_that_are_not_finite_have_a_reason(tmp_path, value):
    rows = np.arange(12.0).reshape(4, 3)
    rows[2, 1] = value
    np.save(tmp_path / "a.npy", rows)
    found = load(tmp_path / "a.npy", "features")
    assert (list(found.names), found.noun) == (["0", "1", "2", "3"], "vector")
    results = dict(found.read([range(1, 4)]))
    assert np.array_equal(results[3].content, rows[3]) and results[2].content is None and results[2].reason


def test_a_reason_outside_the_file_ends_reading(root, monkeypatch):
    def broken(path, size, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(photos, "decode", broken)
    with errors.raises("--images", root / "0.png", "input/output error"):
        list(load(root).read([range(1)]))


def test_a_missing_photo_is_skipped_but_a_missing_folder_ends_reading(root):
    found = load(root)
    (root / "1.png").unlink()
    ((_, read),) = found.read([range(1, 2)])
    assert (read.content, read.reason, read.transient) == (None, "no such file or directory", True)
    shutil.rmtree(root)
    with errors.raises("--images", root):
        list(found.read([range(1)]))
    with errors.raises("--images", root):
        inputs.load_listed_photos(str(root), found.names, size=8)


def test_what_is_no_input_is_refused(root, tmp_path):
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    (tmp_path / "empty").mkdir()
    cases = [
        ("", "images"),
        ("nowhere", "images"),
        ("nowhere", "features"),
        ("photos", "features"),
        ("empty", "images"),
    ]
    cases += [("photos/0.png", "images"), ("none.npy", "features"), ("photos/notes.txt", "features")]
    for name, takes in cases:
        with errors.raises("--images", name):
            load(tmp_path / name if name else "", takes)


def test_another_field_can_be_blamed():
    with pytest.raises(DataError) as caught, inputs.blame_field("--query"):
        raise DataError("--images: /a: bad", field="--images")
    assert (str(caught.value), caught.value.field) == ("--query: /a: bad", "--query")
