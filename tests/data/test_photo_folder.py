"""Any folder: what is found in it, what its classes are, what is left out, and what is refused."""

import os

import numpy as np
import PIL.Image
import pytest

from cib_jax.data import photo_folder, photos
from cib_jax.errors import DataError
from tests.data import pictures


def load(directory, cache, **options):
    return photo_folder.load_folder(str(directory), size=16, cache=cache, **options)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "my photos"


def fill(root, *names):
    for number, name in enumerate(names):
        pictures.write(root / name, pictures.colored(number, 5))


def test_photos_of_every_kind_are_found_at_any_depth_with_any_name(root, cache):
    names = [
        "a b/x y.JPG",
        "a b/c/日本.png",
        "ünï/z.WebP",
        "ünï/.hidden.png/no.png",
        "q/anim.gif",
        "q/scan.tiff",
        "q/p.bmp",
    ]
    fill(root, *(name for name in names if "hidden" not in name))
    fill(root, "ünï/.hidden/no.png", "__MACOSX/no.png", "q/._x.jpg")
    source = load(root, cache)
    expected = sorted(name for name in names if "hidden" not in name)
    assert source.train.names == expected
    for index, name in enumerate(expected):
        assert np.array_equal(source.train.images[index], photos.decode(root / name, 16))


def test_first_level_folders_are_classes(root, cache):
    fill(root, "cat/1.jpg", "cat/2020/2.jpg", "dog/3.jpg", "owl/x/y/4.jpg")
    source = load(root, cache)
    assert list(source.classes) == ["cat", "dog", "owl"]
    # By path, in which "cat/1" comes before "cat/2020".
    assert source.train.labels.tolist() == [0, 0, 1, 2]
    assert any("3 sub-folders are taken for classes" in note for note in source.notes)
    assert load(root, cache, labeled=False).train.labels is None


def test_where_a_photo_has_no_class_nothing_has(root, cache):
    fill(root, "cat/1.jpg", "dog/3.jpg", "4.jpg")
    source = load(root, cache)
    assert (source.train.labels, list(source.classes)) == (None, [])
    assert any("not taken for classes" in note for note in source.notes)
    alone = root / "cat"
    fill(alone, "only/2.jpg", "only/3.jpg", "only/4.jpg")
    (alone / "1.jpg").unlink()
    assert load(alone, cache).train.labels is None


def test_links_are_followed_once_and_never_in_a_circle(root, cache, tmp_path):
    fill(root, "a/1.jpg", "b/2.jpg")
    fill(tmp_path / "elsewhere", "3.jpg")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "b again").symlink_to(root / "b")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "d.jpg").symlink_to(root / "a" / "1.jpg")
    (root / "loop").symlink_to(root / "loop")
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    source = load(root, cache)
    assert source.train.names == ["a/1.jpg", "b/2.jpg", "c/3.jpg", "d.jpg"]
    assert [(bad.path, bad.reason) for bad in source.unreadable] == [("gone.jpg", "no such file or directory")]


def test_what_cannot_be_read_is_listed_with_its_reason(root, cache):
    fill(root, *(f"{number}.jpg" for number in range(5)))
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("hello")
    whole = pictures.content(pictures.smooth(200, 200), "JPEG")
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "notes.txt").write_text("x")
    (root / "phone.HEIC").write_bytes(b"x")
    source = load(root, cache)
    assert len(source.train) == 5
    reasons = {bad.path: bad.reason for bad in source.unreadable}
    assert reasons.keys() == {"empty.jpg", "text.jpg", "cut.jpg"}
    assert reasons["empty.jpg"] == "0 bytes" and reasons["cut.jpg"].startswith("truncated")
    assert any("1 .txt, 1 .heic" in note and "must be converted" in note for note in source.notes)


def test_a_folder_that_may_not_be_entered_is_listed(root, cache, monkeypatch):
    fill(root, "a/1.jpg", "a/2.jpg", "b/3.jpg", "secret/4.jpg", "c.jpg")
    scandir = os.scandir

    def guarded(path):
        if os.fspath(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    source = load(root, cache)
    assert len(source.train) == 4
    assert [(bad.path, bad.reason) for bad in source.unreadable] == [("secret", "permission denied")]
    monkeypatch.setattr(os, "scandir", lambda path: guarded("secret"))
    with pytest.raises(DataError, match=r"config.data.dir: .* cannot be read \(permission denied\)"):
        load(root, cache)


def test_what_is_no_folder_of_photos_is_refused(root, cache):
    with pytest.raises(DataError, match=r"config.data.dir: it is empty"):
        load("", cache)
    with pytest.raises(DataError, match=r"config.data.dir: there is no folder .*my photos"):
        load(root, cache)
    root.mkdir()
    with pytest.raises(DataError, match=r"holds no photos \(nothing\)"):
        load(root, cache)
    (root / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no photos \(only 1 .txt\)"):
        load(root, cache)
    with pytest.raises(DataError, match=r"a.txt is a file; give a folder, or config.data.name=list"):
        load(root / "a.txt", cache)
    fill(root, "1.jpg", "2.jpg")
    (root / "3.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"has 2 readable photos and 1 unreadable ones \(the first: 3.jpg: 0 bytes\)"):
        load(root, cache)


def test_the_bar_is_told_of_every_photo(root, cache):
    fill(root, "1.png", "2.png", "3.png")
    told = []

    class Bar:
        def __init__(self, what, total):
            told.append((what, total))

        def __enter__(self):
            return told.append

        def __exit__(self, *_):
            pass

    load(root, cache, bar=Bar)
    assert told[0] == ("Preparing photos", 3) and sum(told[1:]) == 3


def test_upright_photos_and_one_pixel_wide_ones(root, cache):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    pictures.write(root / "turned.jpg", pictures.smooth(40, 20), exif=exif)
    pictures.write(root / "thin.png", PIL.Image.new("L", (1, 500), 90))
    pictures.write(root / "wide.png", PIL.Image.new("RGBA", (20_000, 2), (0, 0, 0, 0)))
    source = load(root, cache)
    assert source.train.names == ["thin.png", "turned.jpg", "wide.png"]
    assert (source.train.images[0] == 90).all() and (source.train.images[2] == 255).all()
