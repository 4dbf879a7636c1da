"""NUS-WIDE and MSCOCO from miniatures of their published layouts, against a plain reading of the same files."""

import json

import numpy as np
import PIL.Image
import pytest

from cib_jax.data import tfds, tfds_builders
from cib_jax.data.dataset import DataConfig
from tests.data import errors, published


def load(tmp_path, raw, name="nuswide"):
    data = tmp_path / "tfds"
    data.mkdir(exist_ok=True)
    return tfds.load(DataConfig(name, str(data), raw_directory=str(raw)))


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "raw"


def plainly(names, labels):
    """The names that stay and their labels, by the most frequent concepts, counted one by one."""
    counts = [(-sum(column), number) for number, column in enumerate(labels.T.tolist())]
    chosen = sorted(number for _, number in sorted(counts)[:21])
    return [(name, row[chosen].tolist()) for name, row in zip(names, labels, strict=True) if row[chosen].any()], chosen


def test_the_images_of_the_21_most_frequent_concepts_stay_in_published_order(tmp_path, raw):
    names, labels = published.nuswide(raw, 80)
    source = load(tmp_path, raw)
    expected, chosen = plainly(names, labels)
    assert list(source.classes) == [published.CONCEPTS[number] for number in chosen]
    assert source.test is None
    assert len(source.train) == len(expected) < 80
    for index, (name, row) in enumerate(expected):
        assert source.train.labels[index].tolist() == row
        assert np.array_equal(source.train.images[index], np.asarray(PIL.Image.open(raw / "Flickr" / name)))
        assert source.train.names[index] == name
    assert source.unreadable == []


def test_a_prepared_set_needs_the_published_files_no_more(tmp_path, raw):
    published.nuswide(raw, 30)
    first = load(tmp_path, raw)
    again = load(tmp_path, "")
    assert np.array_equal(first.train.labels, again.train.labels)
    assert again.classes == first.classes


def test_missing_and_damaged_images_are_left_out_and_listed(tmp_path, raw):
    names, labels = published.nuswide(raw, 60)
    expected = [name for name, _ in plainly(names, labels)[0]]
    (raw / "Flickr" / expected[3]).unlink()
    whole = (raw / "Flickr" / expected[7]).read_bytes()
    (raw / "Flickr" / expected[7]).write_bytes(whole[: len(whole) // 2])
    (raw / "Flickr" / expected[9]).write_text("<html>gone</html>")
    for _ in range(2):  # as it is prepared, and as it is read again
        source = load(tmp_path, raw)
        assert [bad.path for bad in source.unreadable] == [expected[3], expected[7], expected[9]]
        reasons = [bad.reason for bad in source.unreadable]
        assert reasons[0] == "no such file or directory"
        assert reasons[1].startswith("truncated") and reasons[2].startswith("not a JPEG")
        assert source.train.names == [name for name in expected if name not in (expected[3], expected[7], expected[9])]


def test_archives_unpacked_into_folders_of_their_own_are_found(tmp_path, raw):
    published.nuswide(raw, 30)
    for name in ("ImageList", "Groundtruth", "Flickr"):
        (raw / f"unpacked {name}").mkdir()
        (raw / name).rename(raw / f"unpacked {name}" / name)
    assert len(load(tmp_path, raw).train) > 20


def damage(raw, what):
    folder = raw / "Groundtruth" / "AllLabels"
    first = folder / "Labels_concept00.txt"
    if what == "short":
        first.write_text("0\n" * 29)
    elif what == "two":
        first.write_text("2\n" * 30)
    elif what == "text":
        first.write_text("yes\n" * 30)
    elif what == "few":
        for file in sorted(folder.glob("*"))[20:]:
            file.unlink()
    elif what == "list":
        (raw / "ImageList" / "Imagelist.txt").unlink()
    elif what == "images":
        (raw / "Flickr").rename(raw / "photos of Flickr")
    elif what == "all":
        for file in (raw / "Flickr").rglob("*.jpg"):
            file.unlink()


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("short", ["Labels_concept00.txt", 29, "Imagelist.txt", 30]),
        ("two", ["Labels_concept00.txt"]),
        ("text", ["Labels_concept00.txt"]),
        ("few", ["AllLabels", 20, 81]),
        ("list", ["ImageList/Imagelist.txt", "docs/data.md"]),
        ("images", ["Flickr", "docs/data.md"]),
        ("all", ["Flickr", "no such file"]),
    ],
)
def test_nuswide_files_that_do_not_belong_together_are_refused(tmp_path, raw, what, values):
    published.nuswide(raw, 30)
    damage(raw, what)
    with errors.raises("config.data.raw_dir", raw, *values):
        load(tmp_path, raw)


@pytest.mark.parametrize("name", ["nuswide", "mscoco/2014"])
def test_without_the_published_files_the_field_is_named(tmp_path, name):
    for raw in ("", tmp_path / "nowhere"):
        with errors.raises("config.data.raw_dir", raw, "docs/data.md"):
            load(tmp_path, raw, name)


def test_equally_frequent_concepts_are_taken_in_order():
    labels = np.zeros((10, 30), bool)
    labels[:5, 4:29] = True
    labels[:, 29] = True
    assert tfds_builders.most_frequent(labels).tolist() == [*range(4, 24), 29]


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_labeled_mscoco_images_of_both_parts_come_by_id(tmp_path, raw, year):
    written = published.coco(raw, 40, year=year)
    source = load(tmp_path, raw, f"mscoco/{year}")
    assert source.train.names == [name for name, columns in written.items() if columns]
    assert len(source.train) < len(written)
    for index, name in enumerate(source.train.names):
        assert set(np.flatnonzero(source.train.labels[index])) == written[name]
        assert np.array_equal(source.train.images[index], np.asarray(PIL.Image.open(raw / name)))
    assert source.classes[:2] == ["thing1", "thing2"] and source.classes[79] == "thing90"


def test_mscoco_without_a_year_is_2014(tmp_path, raw):
    published.coco(raw, 12)
    load(tmp_path, raw, "mscoco/2014")
    assert len(load(tmp_path, "", "mscoco").train) == len(load(tmp_path, "", "mscoco/2014").train)


def test_all_of_mscoco_must_leave_the_published_number(tmp_path, raw, monkeypatch):
    written = published.coco(raw, 40)
    monkeypatch.setattr(tfds_builders, "WHOLE", 40)
    with errors.raises("config.data.raw_dir", raw, "122,218", 40):
        load(tmp_path, raw, "mscoco/2014")
    monkeypatch.setattr(tfds_builders, "LABELED", sum(map(bool, written.values())))
    assert len(load(tmp_path, raw, "mscoco/2014").train) == tfds_builders.LABELED


def rewrite(raw, change):
    path = raw / "annotations" / "instances_val2014.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "json": lambda raw: (raw / "annotations" / "instances_train2014.json").write_text('{"images": ['),
    "key": lambda raw: rewrite(raw, lambda content: content.pop("annotations")),
    "category": lambda raw: rewrite(raw, lambda content: content["annotations"][0].update(category_id=12)),
    "image": lambda raw: rewrite(raw, lambda content: content["annotations"][0].update(image_id=10**9)),
    "few": lambda raw: rewrite(raw, lambda content: content["categories"].pop()),
    "annotations": lambda raw: (raw / "annotations" / "instances_train2014.json").unlink(),
    "folder": lambda raw: (raw / "val2014").rename(raw / "validation"),
    "missing": lambda raw: min((raw / "val2014").iterdir()).unlink(),
    "cut": lambda raw: min((raw / "train2014").iterdir()).write_bytes(b"\xff\xd8"),
}


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("json", ["instances_train2014.json", "JSONDecodeError"]),
        ("key", ["instances_val2014.json", "KeyError", "'annotations'"]),
        ("category", ["instances_val2014.json", "category 12"]),
        ("image", ["instances_val2014.json", "image 1000000000"]),
        ("few", ["instances_val2014.json", 79, 80]),
        ("annotations", ["annotations/instances_train2014.json", "docs/data.md"]),
        ("folder", ["val2014", "docs/data.md"]),
        ("missing", ["1 of", "val2014/"]),
        ("cut", ["1 of", "train2014/"]),
    ],
)
def test_mscoco_files_that_are_not_as_published_are_refused(tmp_path, raw, what, values):
    published.coco(raw, 24)
    DAMAGES[what](raw)
    with errors.raises("config.data.raw_dir", *values):
        load(tmp_path, raw, "mscoco/2014")
