"""Features in files: each format read as its own library reads it, mapped and not loaded, and checked."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy

from cib_jax.data import dataset, feature_files
from cib_jax.data.dataset import gather
from cib_jax.errors import DataError

ROWS = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
LABELS = np.arange(20) % 3


def write(folder, kind, features=ROWS, labels=None, ids=None):
    path = folder / f"features.{kind}"
    named = {"features": features, "labels": labels, "ids": ids}
    named = {name: array for name, array in named.items() if array is not None}
    if kind == "npy":
        np.save(path, features)
    elif kind == "npz":
        np.savez(path, **named)
    elif kind == "safetensors":
        named.pop("ids", None)
        safetensors.numpy.save_file({name: np.asarray(array) for name, array in named.items()}, path)
    else:
        columns = {"features": [row for row in features]}
        if labels is not None:
            columns["labels" if np.ndim(labels[0]) else "label"] = list(labels)
        if ids is not None:
            columns["id"] = list(ids)
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


KINDS = ["npy", "npz", "parquet", "safetensors"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_format_and_precision_is_read_as_written(tmp_path, kind, dtype):
    rows = ROWS.astype(dtype)
    source = feature_files.load(str(write(tmp_path, kind, rows)), cache=tmp_path / "cache")
    whole = gather(source.train.images, np.arange(20))
    assert whole.dtype == dtype
    assert np.array_equal(whole, rows)
    assert np.array_equal(source.train.images[7], rows[7])
    assert (source.test, source.train.labels, source.train.names) == (None, None, None)


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_several_views_per_item_are_kept_together(tmp_path, kind):
    rows = ROWS.reshape(10, 2, 6)
    source = feature_files.load(str(write(tmp_path, kind, rows)))
    assert len(source.train) == 10
    assert np.array_equal(source.train.images[3], rows[3])


def test_bfloat16_is_read(tmp_path):
    rows = ROWS.astype(ml_dtypes.bfloat16)
    source = feature_files.load(str(write(tmp_path, "safetensors", rows)))
    assert np.array_equal(np.asarray(source.train.images[3], np.float32), rows[3].astype(np.float32))


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_files_larger_than_memory_are_mapped(tmp_path, kind):
    source = feature_files.load(str(write(tmp_path, kind)), cache=tmp_path / "cache")
    assert isinstance(source.train.images.array, np.memmap)


def test_a_parquet_is_copied_once(tmp_path, monkeypatch):
    path = write(tmp_path, "parquet")
    feature_files.load(str(path), cache=tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(feature_files, "_copy", None)
        feature_files.load(str(path), cache=tmp_path / "cache")
    write(tmp_path, "parquet", ROWS + 1)
    os.utime(path, (1, 1))
    again = feature_files.load(str(path), cache=tmp_path / "cache")
    assert np.array_equal(again.train.images[0], ROWS[0] + 1)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_parquet_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, "parquet")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(DataError, match=r"config.cache.dir: the prepared features take .* has 0.0 GiB free; name"):
            feature_files.load(str(path), cache=tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"config.cache.dir: the copy of .* cannot be kept in .*file"):
        feature_files.load(str(path), cache=tmp_path / "file")
    assert np.array_equal(feature_files.load(str(path), cache=tmp_path / "cache").train.images[3], ROWS[3])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_ids(tmp_path, kind):
    ids = [f"item {number}" for number in range(20)]
    path = write(tmp_path, kind, labels=LABELS, ids=np.array(ids))
    if kind == "npy":
        np.save(tmp_path / "features.labels.npy", LABELS)
    if kind in ("npy", "safetensors"):
        (tmp_path / "features.ids.txt").write_text("\n".join(ids) + "\n")
    source = feature_files.load(str(path))
    assert source.train.labels.tolist() == LABELS.tolist()
    assert list(source.classes) == ["0", "1", "2"]
    assert source.train.names == ids
    assert feature_files.load(str(path), labeled=False).train.labels is None


def test_labels_may_be_names_or_several(tmp_path):
    names = np.array(["b", "a"])[LABELS % 2]
    assert (
        feature_files.load(str(write(tmp_path, "npz", labels=names))).train.labels.tolist() == (1 - LABELS % 2).tolist()
    )
    hot = np.random.default_rng(1).random((20, 4)) < 0.5
    assert np.array_equal(feature_files.load(str(write(tmp_path, "npz", labels=hot))).train.labels, hot)
    several = [[name for name, one in zip("wxyz", row, strict=True) if one] for row in hot]
    source = feature_files.load(str(write(tmp_path, "parquet", labels=several)))
    assert list(source.classes) == ["w", "x", "y", "z"]
    assert np.array_equal(source.train.labels, hot)


def broken(value, row, column):
    rows = ROWS.copy()
    rows[row, column] = value
    return rows


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (broken(np.nan, 13, 4), r"holds 1 values that are not finite, the first in row 13, column 4"),
        (broken(np.inf, 0, 0), r"the first in row 0, column 0"),
        (ROWS[0], r"holds an array \[6\]; \[items, features\] or"),
        (ROWS.reshape(1, 5, 4, 6), r"holds an array \[1, 5, 4, 6\]"),
        (ROWS[:, :0], r"holds an array \[20, 0\]"),
        (ROWS[:2], r"holds 2 items; at least 3"),
        ((ROWS * 100).astype(np.int32), r"holds int32, not floating-point numbers; convert them"),
        (np.ones((9, 4), np.float32), r"holds the same vector in every row"),
        (np.array([[{}]] * 5, object), r"cannot be read as .npy \(ValueError"),
    ],
)
def test_what_nothing_can_be_learnt_from_is_refused(tmp_path, features, message, monkeypatch):
    monkeypatch.setattr(feature_files, "BLOCK", 8)
    path = tmp_path / "features.npy"
    np.save(path, features, allow_pickle=features.dtype == object)
    with pytest.raises(DataError, match=r"config.data.dir: .*" + message):
        feature_files.load(str(path))


def test_labels_beside_that_are_no_array_are_refused(tmp_path):
    path = write(tmp_path, "npy")
    for content in (b"", b"text, not numbers"):
        (tmp_path / "features.labels.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"features.labels.npy cannot be read as .npy .*labelled=False"):
            feature_files.load(str(path))
        assert feature_files.load(str(path), labeled=False).train.labels is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": LABELS[:19]}, "has 20 rows but 19 labels"),
        ({"labels": LABELS * 0.5}, r"has labels of type float64 \[20\]"),
        ({"labels": LABELS[:, None] * np.ones((1, 2), int)}, r"has labels of type int64 \[20, 2\]"),
        ({"ids": np.arange(19)}, "has 20 rows but 19 ids"),
        ({"ids": np.arange(20) // 2}, "has the id '0' more than once"),
    ],
)
def test_labels_and_ids_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        feature_files.load(str(write(tmp_path, "npz", **options)))


def test_what_is_no_file_of_features_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"config.data.dir: there is no file .*nothing.npy"):
        feature_files.load(str(tmp_path / "nothing.npy"))
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"a.csv is none of .npy, .npz, .parquet, .safetensors"):
        feature_files.load(str(tmp_path / "a.csv"))
    for kind in KINDS:
        (tmp_path / f"text.{kind}").write_text("this is no such file, but some text of some length")
        with pytest.raises(DataError, match=rf"cannot be read as .{kind}"):
            feature_files.load(str(tmp_path / f"text.{kind}"))
    np.savez(tmp_path / "other.npz", vectors=ROWS)
    with pytest.raises(DataError, match=r"other.npz has no 'features', but vectors; name them so"):
        feature_files.load(str(tmp_path / "other.npz"))
    pyarrow.parquet.write_table(pyarrow.table({"features": [[1.0, 2.0], [1.0]]}), tmp_path / "ragged.parquet")
    with pytest.raises(DataError, match=r"rows have 1 to 2 features; all need as many"):
        feature_files.load(str(tmp_path / "ragged.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"features": [1.0, 2.0]}), tmp_path / "flat.parquet")
    with pytest.raises(DataError, match=r"the column 'features' holds double, not a list"):
        feature_files.load(str(tmp_path / "flat.parquet"))


def test_a_safetensors_file_that_lies_about_its_size_is_refused(tmp_path):
    path = tmp_path / "short.safetensors"
    header = json.dumps({"features": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    with pytest.raises(DataError, match=r"features does not fit into the file"):
        feature_files.load(str(path))


def test_identity_follows_the_file(tmp_path):
    path = write(tmp_path, "npy")
    first = feature_files.load(str(path)).train.images.identity
    assert feature_files.load(str(path)).train.images.identity == first
    os.utime(path, (1, 1))
    assert feature_files.load(str(path)).train.images.identity != first


def test_batches_are_gathered_in_order(tmp_path):
    images = feature_files.load(str(write(tmp_path, "npy"))).train.take(np.arange(19, 4, -1)).images
    batches = list(dataset.stream(images, np.array([3, 0, 14, 5, 7]), 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert np.array_equal(np.concatenate(batches), ROWS[[16, 19, 5, 14, 12]])
    assert [len(batch) for batch in dataset.stream(images, np.arange(5), 2, drop_remainder=True)] == [2, 2]
    assert np.array_equal(dataset.materialize(images), ROWS[19:4:-1])
    assert dataset.size_in_bytes(images) == 15 * 6 * 4
