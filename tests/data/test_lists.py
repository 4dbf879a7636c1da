"""Lists of photos: what a file says becomes images, labels and splits; what it says wrongly is refused."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from cib_jax.data import photo_folder, photos
from cib_jax.errors import DataError
from tests.data import pictures


@pytest.fixture
def root(tmp_path):
    for number in range(6):
        pictures.write(tmp_path / "in here" / f"{number}.png", pictures.colored(number, 6))
    return tmp_path


PATHS = [f"in here/{number}.png" for number in (3, 1, 5, 0)]


def write(root, columns, kind):
    path = root / f"list.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        rows = zip(*columns.values(), strict=True)
        path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def load(path, **options):
    return photo_folder.load_list(str(path), size=16, cache=path.parent / "cache", **options)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_photos_come_in_the_order_of_the_list_with_their_labels(root, kind):
    source = load(write(root, {"path": PATHS, "label": ["b", "a", "b", "c"], "other": [1, 2, 3, 4]}, kind))
    assert source.train.names == PATHS
    assert (list(source.classes), source.train.labels.tolist()) == (["a", "b", "c"], [1, 0, 1, 2])
    for index, name in enumerate(PATHS):
        assert np.array_equal(source.train.images[index], photos.decode(root / name, 16))
    assert source.roles is None


@pytest.mark.parametrize("labels", [["10", "9", "10", "007"], [10, 9, 10, 7]])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_numbers_as_labels_are_ordered_by_value(root, labels, kind):
    source = load(write(root, {"path": PATHS, "label": labels}, kind))
    assert source.train.labels.tolist() == [2, 1, 2, 0]
    assert [int(name) for name in source.classes] == [7, 9, 10]


@pytest.mark.parametrize(
    ("kind", "labels"), [("csv", ["x|y", "", "z", "y"]), ("parquet", [["x", "y"], [], ["z"], ["y"]])]
)
def test_several_labels_become_multi_hot_and_none_is_allowed(root, kind, labels):
    source = load(write(root, {"path": PATHS, "labels": labels}, kind))
    assert list(source.classes) == ["x", "y", "z"]
    assert source.train.labels.astype(int).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_without_labels_there_are_none(root):
    assert load(write(root, {"path": PATHS}, "csv")).train.labels is None
    assert load(write(root, {"path": PATHS, "label": list("abab")}, "csv"), labeled=False).train.labels is None


def test_the_list_may_give_the_splits_and_unreadable_photos_leave_theirs(root):
    (root / "in here" / "1.png").write_bytes(b"")
    columns = {"path": [*PATHS, "in here/2.png", str(root / "in here" / "4.png"), "gone.png"], "label": list("abcabca")}
    columns["split"] = ["train", "train", "query", "database", "train", "train_only", "query"]
    source = load(write(root, columns, "csv"))
    assert {role: part.names for role, part in source.roles.items()} == {
        "train": ["in here/3.png", "in here/2.png"],
        "query": ["in here/5.png"],
        "database": ["in here/0.png"],
        "train_only": [str(root / "in here" / "4.png")],
    }
    assert source.roles["train"].labels.tolist() == [0, 1]
    assert [(bad.path, bad.reason) for bad in source.unreadable] == [
        ("in here/1.png", "0 bytes"),
        ("gone.png", "no such file or directory"),
    ]


def test_a_csv_as_spreadsheets_write_it(root):
    path = root / "list.csv"
    path.write_bytes('\ufeffpath,label\r\n"in here/3.png","a, b"\r\nin here/1.png,ü\r\nin here/5.png,ü\r\n'.encode())
    source = load(path)
    assert (list(source.classes), source.train.labels.tolist()) == (["a, b", "ü"], [0, 1, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,b\n", r"list.csv has no column 'path', but 'file', 'label'; name"),
        ("path\n", "names no photo"),
        ("", r"cannot be read as csv \(Empty CSV file\)"),
        ("path,label\na\n", r"cannot be read as csv \(CSV parse error"),
        ("path,label\na.png,x\na.png,x\n", "names 'a.png' twice"),
        ("path,label\na.png,x\nb.png,\n", "row 2: label is empty"),
        ("path,label,labels\na.png,x,y\n", "has both 'label' and 'labels'"),
        ("path,labels\na.png,\n", "column 'labels' without any label"),
        ("path,split\na.png,learn\n", "row 1: split is 'learn', not one of train, database, query"),
        ("path,label\na.png,x\n,x\n", "row 2: path is ''"),
        ("path,label\na.png,x\nb.png,x\n", "has 0 readable photos and 2 unreadable ones"),
    ],
)
def test_a_bad_list_is_refused(root, text, message):
    path = root / "list.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load(path)


def test_what_is_no_list_is_refused(root):
    with pytest.raises(DataError, match=r"config.data.dir: there is no file .*nothing.csv"):
        load(root / "nothing.csv")
    (root / "list.txt").write_text("path\n")
    with pytest.raises(DataError, match=r"list.txt is neither .csv nor .parquet"):
        load(root / "list.txt")
    (root / "list.parquet").write_text("no")
    with pytest.raises(DataError, match=r"cannot be read as parquet"):
        load(root / "list.parquet")
    path = root / "latin.csv"
    path.write_bytes("path\nä.png\n".encode("latin1"))
    with pytest.raises(DataError, match=r"cannot be read as csv \(.*UTF8"):
        load(path)
