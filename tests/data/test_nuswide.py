"""NUS-WIDE from a miniature of its published layout, against a plain reading of the same files; and what is refused."""

import numpy as np
import PIL.Image
import pytest

from cib_jax.data import tfds, tfds_builders
from cib_jax.errors import DataError
from tests.data import published


def load(tmp_path, raw):
    data = tmp_path / "tfds"
    data.mkdir(exist_ok=True)
    return tfds.load("nuswide", str(data), raw=str(raw))


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
    ("what", "message"),
    [
        ("short", r"config.data.raw_dir: .*Labels_concept00.txt has 29 lines, but .*Imagelist.txt has 30"),
        ("two", r"Labels_concept00.txt holds something else than 0 and 1"),
        ("text", r"Labels_concept00.txt holds something else than 0 and 1"),
        ("few", r"AllLabels holds 20 files Labels_\*.txt, where 81 are published and 21 needed"),
        ("list", r"there is no ImageList/Imagelist.txt or Imagelist.txt in .*raw.*docs/data.md"),
        ("images", r"there is no Flickr or images"),
        ("all", r"none of the \d+ images that are listed is in .*Flickr \(the first: .*no such file"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, raw, what, message):
    published.nuswide(raw, 30)
    damage(raw, what)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, raw)
    assert "\n" not in str(error.value)


def test_without_the_published_files_the_field_is_named(tmp_path):
    for raw in ("", tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"config.data.raw_dir: .*docs/data.md"):
            load(tmp_path, raw)


def test_equally_frequent_concepts_are_taken_in_order():
    labels = np.zeros((10, 30), bool)
    labels[:5, 4:29] = True
    labels[:, 29] = True
    assert tfds_builders.most_frequent(labels).tolist() == [*range(4, 24), 29]
