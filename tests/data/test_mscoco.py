"""MSCOCO from a miniature of its published layout, against what was written into it; and what is refused."""

import json

import numpy as np
import PIL.Image
import pytest

from cib_jax.data import tfds, tfds_builders
from cib_jax.errors import DataError
from tests.data import published


def load(tmp_path, raw, year="2014"):
    data = tmp_path / "tfds"
    data.mkdir(exist_ok=True)
    return tfds.load(f"mscoco/{year}", str(data), raw=str(raw))


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "raw"


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_labeled_images_of_both_parts_come_by_id(tmp_path, raw, year):
    written = published.coco(raw, 40, year=year)
    source = load(tmp_path, raw, year)
    assert source.train.names == [name for name, columns in written.items() if columns]
    assert len(source.train) < len(written)
    for index, name in enumerate(source.train.names):
        assert set(np.flatnonzero(source.train.labels[index])) == written[name]
        assert np.array_equal(source.train.images[index], np.asarray(PIL.Image.open(raw / name)))
    assert source.classes[:2] == ["thing1", "thing2"] and source.classes[79] == "thing90"


def test_the_plain_name_is_2014(tmp_path, raw):
    published.coco(raw, 12)
    load(tmp_path, raw)
    assert len(tfds.load("mscoco", str(tmp_path / "tfds")).train) == len(load(tmp_path, "").train)


def test_the_whole_set_must_leave_the_published_number(tmp_path, raw, monkeypatch):
    written = published.coco(raw, 40)
    monkeypatch.setattr(tfds_builders, "WHOLE", 40)
    with pytest.raises(
        DataError, match=r"of the 40 images in .*raw have an object marked, where 122,218 are published"
    ):
        load(tmp_path, raw)
    monkeypatch.setattr(tfds_builders, "LABELLED", sum(map(bool, written.values())))
    assert len(load(tmp_path, raw).train) == tfds_builders.LABELLED


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
    ("what", "message"),
    [
        ("json", r"config.data.raw_dir: .*instances_train2014.json is no file of COCO instances \(JSONDecodeError"),
        ("key", r"instances_val2014.json is no file of COCO instances \(KeyError: 'annotations'\)"),
        ("category", r"marks category 12 in image \d+, which it does not list"),
        ("image", r"marks category \d+ in image 1000000000"),
        ("few", r"has 79 categories, where 80 are published"),
        ("annotations", r"there is no annotations/instances_train2014.json .* docs/data.md"),
        ("folder", r"there is no val2014 or images/val2014"),
        ("missing", r"1 of \d+ images are missing or unreadable \(the first: val2014/.*: no such file"),
        ("cut", r"1 of \d+ images are missing or unreadable \(the first: train2014/"),
    ],
)
def test_what_is_not_as_published_is_refused(tmp_path, raw, what, message):
    published.coco(raw, 24)
    DAMAGES[what](raw)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, raw)
    assert "\n" not in str(error.value)


def test_without_the_published_files_the_field_is_named(tmp_path):
    with pytest.raises(DataError, match=r"config.data.raw_dir: .*docs/data.md"):
        load(tmp_path, "")
