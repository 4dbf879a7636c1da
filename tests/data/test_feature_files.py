"""Feature files: each format read as its own library reads it, mapped rather than loaded, and validated."""

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
from tests.data import errors

ROWS = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
LABELS = np.arange(20) % 3
FEATURES = pyarrow.list_(pyarrow.float32())


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
    source = feature_files.load(str(write(tmp_path, kind, rows)), cache_root=tmp_path / "cache")
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
    source = feature_files.load(str(write(tmp_path, kind)), cache_root=tmp_path / "cache")
    assert isinstance(source.train.images.array, np.memmap)


@pytest.mark.parametrize("lists", [pyarrow.list_, pyarrow.large_list, lambda kind: pyarrow.list_(kind, 6)])
def test_every_kind_of_list_in_a_parquet_is_read(tmp_path, lists):
    column = pyarrow.array(ROWS.tolist(), lists(pyarrow.float32()))
    pyarrow.parquet.write_table(pyarrow.table({"features": column}), tmp_path / "a.parquet", row_group_size=7)
    source = feature_files.load(str(tmp_path / "a.parquet"))
    assert np.array_equal(gather(source.train.images, np.arange(20)), ROWS)


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ([("features", []), ("label", [])], ["no row"]),
        ([("features", ROWS), ("features", ROWS)], ["'features'"]),
        ([("features", ROWS), ("id", list("ab" * 10)), ("id", list("cd" * 10))], ["'id'"]),
        ([("features", [*ROWS[:9], None, *ROWS[10:]])], ["row 9"]),
        ([("features", ROWS), ("label", ["a"] * 20), ("labels", [["a"]] * 20)], ["'label'", "'labels'"]),
        ([("features", ROWS), ("label", [["a"]] * 20)], ["row 1", "'labels'"]),
        ([("features", ROWS), ("label", [1.0, float("nan")] * 10)], ["row 2"]),
        ([("features", ROWS), ("id", ["a", None, *map(str, range(18))])], ["row 1"]),
    ],
)
def test_columns_of_a_parquet_that_do_not_fit_are_refused(tmp_path, columns, values):
    arrays = [pyarrow.array(list(rows), FEATURES if name == "features" else None) for name, rows in columns]
    table = pyarrow.table(arrays, names=[name for name, _ in columns])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    for cache in (None, tmp_path / "cache"):
        with errors.raises("config.data.dir", "a.parquet", *values):
            feature_files.load(str(tmp_path / "a.parquet"), cache_root=cache)


def test_a_parquet_is_copied_once(tmp_path):
    path = write(tmp_path, "parquet")
    feature_files.load(str(path), cache_root=tmp_path / "cache")
    (copy,) = (tmp_path / "cache").glob("*/features.npy")
    changed = copy.stat().st_mtime_ns
    feature_files.load(str(path), cache_root=tmp_path / "cache")
    assert copy.stat().st_mtime_ns == changed
    write(tmp_path, "parquet", ROWS + 1)
    os.utime(path, (1, 1))
    again = feature_files.load(str(path), cache_root=tmp_path / "cache")
    assert np.array_equal(again.train.images[0], ROWS[0] + 1)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_parquet_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, "parquet")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: usage)
        with errors.raises("config.cache.dir", "0.0 GiB"):
            feature_files.load(str(path), cache_root=tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with errors.raises("config.cache.dir", path, tmp_path / "file"):
        feature_files.load(str(path), cache_root=tmp_path / "file")
    assert np.array_equal(feature_files.load(str(path), cache_root=tmp_path / "cache").train.images[3], ROWS[3])


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_ids_of_a_text_file_are_its_lines(tmp_path, encoding, line_end):
    ids = [f"item\u2028\x0b\x85 {number}" for number in range(20)]
    for end in ("", line_end):
        (tmp_path / "features.ids.txt").write_bytes((line_end.join(ids) + end).encode(encoding))
        assert feature_files.load(str(write(tmp_path, "npy"))).train.names == ids


def test_ids_that_are_not_utf_8_keep_their_bytes(tmp_path):
    (tmp_path / "features.ids.txt").write_bytes(b"".join(b"caf\xe9 %d\n" % number for number in range(20)))
    names = feature_files.load(str(write(tmp_path, "npy"))).train.names
    assert os.fsencode(names[7]) == b"caf\xe9 7"


def test_labels_may_be_names_or_several(tmp_path):
    names = np.array(["b", "a"])[LABELS % 2]
    assert (
        feature_files.load(str(write(tmp_path, "npz", labels=names))).train.labels.tolist() == (1 - LABELS % 2).tolist()
    )
    in_bytes = feature_files.load(
        str(write(tmp_path, "npz", labels=np.char.encode(names), ids=np.arange(20).astype("S")))
    )
    assert list(in_bytes.classes) == ["a", "b"] and list(in_bytes.train.names) == [str(row) for row in range(20)]
    with errors.raises("config.data.dir", "features.npz", "UTF-8"):
        feature_files.load(str(write(tmp_path, "npz", labels=np.array([b"\xff"] * 20))))
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
    ("features", "value"),
    [
        (broken(np.nan, 13, 4), "row 13, column 4"),
        (broken(np.inf, 0, 0), "row 0, column 0"),
        (broken(np.nan, 13, 4).reshape(10, 2, 6), "row 6, column 4"),
        (ROWS.astype(np.float64) * 1e40, "row 0, column 0"),
        (ROWS.astype(">f4"), ">f4"),
        (ROWS.astype(">f8"), ">f8"),
        (ROWS.astype(np.longdouble), "float128"),
        (ROWS[0], "got [6]"),
        (ROWS.reshape(1, 5, 4, 6), "got [1, 5, 4, 6]"),
        (ROWS[:, :0], "got [20, 0]"),
        (ROWS[:2], "got 2"),
        ((ROWS * 100).astype(np.int32), "int32"),
        (np.ones((9, 4), np.float32), "same vector"),
        (np.array([[{}]] * 5, object), "ValueError"),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused(tmp_path, features, value, monkeypatch):
    monkeypatch.setattr(feature_files, "BLOCK", 8)
    path = tmp_path / "features.npy"
    np.save(path, features, allow_pickle=features.dtype == object)
    with errors.raises("config.data.dir", path, value):
        feature_files.load(str(path))


def test_labels_beside_that_are_no_array_are_refused(tmp_path):
    path = write(tmp_path, "npy")
    for content in (b"", b"text, not numbers"):
        (tmp_path / "features.labels.npy").write_bytes(content)
        with errors.raises("config.data.dir", "features.labels.npy", "labelled=False"):
            feature_files.load(str(path))
        assert feature_files.load(str(path), labeled=False).train.labels is None


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"labels": LABELS[:19]}, ["19", "20"]),
        ({"labels": LABELS * 0.5}, ["float64 [20]"]),
        ({"labels": LABELS[:, None] * np.ones((1, 2), int)}, ["int64 [20, 2]"]),
        ({"labels": np.array(["a", "nan"] * 10)}, ["row 1", "labelled=False"]),
        ({"ids": np.array(["a", "", *map(str, range(18))])}, ["row 1"]),
        ({"ids": np.arange(19)}, ["19", "20"]),
        ({"ids": np.arange(20) // 2}, ["'0'"]),
    ],
)
def test_labels_and_ids_that_do_not_fit_are_refused(tmp_path, options, values):
    with errors.raises("config.data.dir", "features.npz", *values):
        feature_files.load(str(write(tmp_path, "npz", **options)))


def test_what_is_no_file_of_features_is_refused(tmp_path):
    with errors.raises("config.data.dir", "nothing.npy"):
        feature_files.load(str(tmp_path / "nothing.npy"))
    (tmp_path / "a.csv").write_text("1,2")
    with errors.raises("config.data.dir", "a.csv", ".npy, .npz, .parquet, .safetensors"):
        feature_files.load(str(tmp_path / "a.csv"))
    for kind in KINDS:
        (tmp_path / f"text.{kind}").write_text("this is no such file, but some text of some length")
        with errors.raises("config.data.dir", f"text.{kind}"):
            feature_files.load(str(tmp_path / f"text.{kind}"))
    np.savez(tmp_path / "other.npz", vectors=ROWS)
    with errors.raises("config.data.dir", "other.npz", "'features'", "vectors"):
        feature_files.load(str(tmp_path / "other.npz"))
    pyarrow.parquet.write_table(pyarrow.table({"features": [[1.0, 2.0], [1.0]]}), tmp_path / "ragged.parquet")
    with errors.raises("config.data.dir", "ragged.parquet", "1 to 2"):
        feature_files.load(str(tmp_path / "ragged.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"features": [1.0, 2.0]}), tmp_path / "flat.parquet")
    with errors.raises("config.data.dir", "flat.parquet", "double"):
        feature_files.load(str(tmp_path / "flat.parquet"))
    empty = pyarrow.table({"features": pyarrow.array([], pyarrow.list_(pyarrow.float32()))})
    pyarrow.parquet.write_table(empty, tmp_path / "empty.parquet")
    with errors.raises("config.data.dir", "empty.parquet"):
        feature_files.load(str(tmp_path / "empty.parquet"), cache_root=tmp_path / "cache")


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "short.safetensors"
    header = json.dumps({"features": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    with errors.raises("config.data.dir", "short.safetensors", "does not fit"):
        feature_files.load(str(path))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"data_offsets": [-4, 476]}, "does not fit"),
        ({"data_offsets": [480, 0]}, "does not fit"),
        ({"data_offsets": [4, 484]}, "does not fit"),
        ({"shape": [20, 7]}, "does not fit"),
        ({"shape": [-20, -6]}, "negative"),
        ({"shape": [20.0, 6.0]}, "float"),
        ({"dtype": "F8_E4M3"}, "F8_E4M3"),
    ],
)
def test_a_safetensors_header_that_does_not_fit_the_file_is_refused(tmp_path, entry, reason):
    path = tmp_path / "a.safetensors"
    features = {"dtype": "F32", "shape": [20, 6], "data_offsets": [0, 480]} | entry
    header = json.dumps({"features": features}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + ROWS.tobytes())
    with errors.raises("config.data.dir", "a.safetensors", reason):
        feature_files.load(str(path))


def test_batches_are_gathered_in_order(tmp_path):
    images = feature_files.load(str(write(tmp_path, "npy"))).train.take(np.arange(19, 4, -1)).images
    batches = list(dataset.stream(images, np.array([3, 0, 14, 5, 7]), 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert np.array_equal(np.concatenate(batches), ROWS[[16, 19, 5, 14, 12]])
    assert np.array_equal(dataset.materialize(images), ROWS[19:4:-1])
    assert dataset.size_in_bytes(images) == 15 * 6 * 4


def test_map_features_takes_only_files_that_can_be_mapped(tmp_path):
    (tmp_path / "features.ids.txt").write_text("\n".join(map(str, range(100, 120))))
    for kind in ("npy", "safetensors"):
        features, ids = feature_files.map_features(str(write(tmp_path, kind)))
        assert isinstance(features, np.memmap) and np.array_equal(features, ROWS) and ids[3] == "103"
    for kind in ("npz", "parquet"):
        with errors.raises("config.data.dir", f"features.{kind}", ".npy"):
            feature_files.map_features(str(write(tmp_path, kind)))
