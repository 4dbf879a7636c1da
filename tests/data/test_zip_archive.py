"""Zips of photos: intact, damaged and hostile ones."""

import os
import shutil
import stat
import subprocess
import time
import zipfile

import pytest

from cib_jax.data import photo_folder, zip_archive
from cib_jax.data.zip_archive import unzip
from tests.data import errors, pictures


def photo(tmp_path, seed=0):
    path = tmp_path / f"made{seed}.jpg"
    pictures.write(path, pictures.smooth(40, 30, seed=seed))
    return path.read_bytes()


def zipped(path, files, how=zipfile.ZIP_STORED):
    """A zip of (name or ZipInfo, content)."""
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


def test_photos_come_out_as_they_went_in(tmp_path):
    content = photo(tmp_path)
    entry = zipfile.ZipInfo("a/b.JPG", (2021, 7, 1, 12, 30, 2))
    path = zipped(
        tmp_path / "my.zip", [(entry, content), ("c.png", b"x"), ("d\\ünï.webp", b"y"), ("a/notes.txt", b"z")]
    )
    found = unzip(path)
    assert (found.directory, found.photos, found.refused) == (tmp_path / "my", 3, [])
    assert (found.directory / "a" / "b.JPG").read_bytes() == content
    assert photo_folder.walk_folder(str(found.directory)).paths == ["a/b.JPG", "c.png", "d/ünï.webp"]
    assert time.localtime((found.directory / "a" / "b.JPG").stat().st_mtime)[:6] == (2021, 7, 1, 12, 30, 2)
    assert len(found.notes()) == 2 and str(tmp_path / "my") in found.notes()[0] and "1 .txt" in found.notes()[1]


def test_thumbnails_and_deleted_files_are_not_unpacked(tmp_path):
    names = ["a/x.jpg", "a/@eaDir/x.jpg/THUMB.jpg", "#recycle/x.jpg", "L.photoslibrary/resources/derivatives/x.jpg"]
    found = unzip(zipped(tmp_path / "my.zip", [(name, b"x") for name in names]))
    assert [str(path.relative_to(found.directory)) for path in found.directory.rglob("*.jpg")] == ["a/x.jpg"]


def test_again_nothing_is_unpacked_and_another_zip_takes_the_place(tmp_path):
    path = zipped(tmp_path / "my.zip", [("a.jpg", b"1"), ("b.jpg", b"2"), ("../c.jpg", b"3"), ("d.txt", b"")])
    first = unzip(path)
    before = (first.directory / "a.jpg").stat()
    assert unzip(path) == first
    assert (first.directory / "a.jpg").stat() == before
    zipped(path, [("b.jpg", b"22")])
    assert unzip(path).photos == 1
    assert [path.name for path in first.directory.glob("*.jpg")] == ["b.jpg"]
    assert sorted(os.listdir(tmp_path)) == ["my", "my.zip"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../out.jpg", "leads out"), ("a/../../out.jpg", "leads out"), ("/out.jpg", "leads out"),
        ("//host/out.jpg", "leads out"), ("a//out.jpg", "leads out"), ("C:/out.jpg", "leads out"),
        ("..\\out.jpg", "leads out"), ("x" * 201 + ".jpg", "too long"), ("y/" * 600 + "z.jpg", "too long"),
    ],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_is_left_out(tmp_path, name, why):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = zipped(inside / "my.zip", [("good.jpg", b"1"), (zipfile.ZipInfo("x.jpg"), b"2")])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.jpg", b"1")
        entry = zipfile.ZipInfo("x.jpg")
        entry.filename = entry.orig_filename = name  # past what its constructor mends
        archive.writestr(entry, b"2")
    found = unzip(path)
    assert found.photos == 1
    assert why in found.refused[0].reason
    assert sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*.jpg")) == ["inside/my/good.jpg"]


def test_what_is_hidden_is_passed_over(tmp_path):
    path = zipped(
        tmp_path / "my.zip", [("__MACOSX/._a.jpg", b"1"), ("a.jpg", b"2"), (".b/c.jpg", b"3"), (".d.jpg", b"")]
    )
    found = unzip(path)
    assert (found.photos, dict(found.others), found.refused) == (1, {}, [])


def test_links_pipes_locked_photos_and_second_names_are_left_out(tmp_path):
    files = [("good.jpg", b"1")]
    for name, kind in (("link.jpg", stat.S_IFLNK), ("pipe.jpg", stat.S_IFIFO)):
        entry = zipfile.ZipInfo(name)
        entry.external_attr = (kind | 0o777) << 16
        files.append((entry, "/etc/passwd"))
    path = zipped(tmp_path / "my.zip", [*files, ("good.jpg/inside.jpg", b"2"), ("locked.jpg", b"3")])
    content = bytearray(path.read_bytes())
    at = content.rindex(b"locked.jpg")  # in the directory of the zip
    content[at - 46 + 8] |= 1
    path.write_bytes(content)
    found = unzip(path)
    assert found.photos == 1
    assert {one.path: one.reason for one in found.refused} == {
        "link.jpg": "a link or another special file",
        "pipe.jpg": "a link or another special file",
        "locked.jpg": "encrypted",
        "good.jpg/inside.jpg": "another file of the zip has its place",
    }
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = zipped(tmp_path / "twice.zip", [("a.jpg", b"1"), ("a.jpg", b"2")])
    assert unzip(twice).refused[0].reason == "its name occurs twice"


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_photo_is_left_out(tmp_path, how):
    content = os.urandom(5000)
    path = zipped(tmp_path / "my.zip", [("bad.jpg", content), ("good.jpg", content)], how)
    damaged = bytearray(path.read_bytes())
    damaged[2000:2010] = bytes(10)
    path.write_bytes(damaged)
    found = unzip(path)
    assert (found.photos, [one.path for one in found.refused]) == (1, ["bad.jpg"])
    assert found.refused[0].reason.startswith("damaged")
    assert not (found.directory / "bad.jpg").exists()


def test_a_zip_that_says_less_than_it_holds_gets_no_more_room(tmp_path):
    path = zipped(tmp_path / "my.zip", [("bomb.jpg", bytes(1_000_000)), ("good.jpg", b"1")], zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    size = (1_000_000).to_bytes(4, "little")
    while (at := content.find(size)) >= 0:
        content[at : at + 4] = (1000).to_bytes(4, "little")
    path.write_bytes(content)
    found = unzip(path)
    assert (found.photos, [one.path for one in found.refused]) == (1, ["bomb.jpg"])


def test_bombs_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_archive, "_BOMB_GB", 0.001)
    path = zipped(tmp_path / "my.zip", [(f"{number}.bmp", bytes(300_000)) for number in range(9)], zipfile.ZIP_DEFLATED)
    with errors.raises(str(path), "decompression bomb"):
        unzip(path)
    monkeypatch.setattr(zip_archive, "MAX_GB", 0.001)
    with errors.raises(str(path), "0.001 GB"):
        unzip(path)
    monkeypatch.setattr(zip_archive, "MAX_PHOTO_MB", 0.2)
    with errors.raises(str(path), "0.bmp", "0.2 MB"):
        unzip(path)
    monkeypatch.setattr(zip_archive, "MAX_FILES", 8)
    with errors.raises(str(path), "8 files", "got 9"):
        unzip(path)
    assert os.listdir(tmp_path) == ["my.zip"]


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    path = zipped(tmp_path / "my.zip", [("a.bmp", bytes(3000))])
    usage = shutil.disk_usage(tmp_path)._replace(free=2999)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with errors.raises(str(path), tmp_path):
        unzip(path)
    assert os.listdir(tmp_path) == ["my.zip"]


def test_what_is_no_zip_of_photos_is_refused_in_a_sentence(tmp_path):
    with errors.raises(str(tmp_path / "nowhere.zip")):
        unzip(tmp_path / "nowhere.zip")
    for content in (b"", b"no zip", zipped(tmp_path / "a.zip", [("a.jpg", bytes(999))]).read_bytes()[:-30]):
        (tmp_path / "bad.zip").write_bytes(content)
        with errors.raises(str(tmp_path / "bad.zip")):
            unzip(tmp_path / "bad.zip")
    with errors.raises(str(tmp_path / "none.zip"), "1 .jxl, 1 .txt", "converted"):
        unzip(zipped(tmp_path / "none.zip", [("a.jxl", b""), ("b.txt", b"")]))
    with errors.raises(str(tmp_path / "empty.zip"), "nothing"):
        unzip(zipped(tmp_path / "empty.zip", []))
    assert not [name for name in os.listdir(tmp_path) if not name.endswith(".zip")]


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    path = zipped(tmp_path / "my.zip", [("a.jpg", b"1")])
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "own.jpg").write_bytes(b"mine")
    with errors.raises(str(path), tmp_path / "my"):
        unzip(path)
    for file in (path, tmp_path / "my" / "own.jpg", tmp_path / "my" / "own.jpg" / "inside"):
        with errors.raises(str(path), file):
            unzip(path, file)
    assert (tmp_path / "my" / "own.jpg").read_bytes() == b"mine"
    assert unzip(path, tmp_path / "new" / "place").directory == tmp_path / "new" / "place"


def add(folder):
    (folder / "a" / "own.jpg").write_bytes(b"mine")


def change(folder):
    (folder / "a" / "1.jpg").write_bytes(b"rotated")


def link(folder):
    (folder / "album").symlink_to(folder.parent)


def forget(folder):
    (folder / ".unzipped.json").write_text('{"zip": [1, 2], "photos": 1, "others": {}, "refused": []}')


@pytest.mark.parametrize("edit", [add, change, link, forget])
def test_a_newer_zip_never_deletes_what_was_added_or_changed(tmp_path, edit):
    path = zipped(tmp_path / "my.zip", [("a/1.jpg", b"1")])
    folder = unzip(path).directory
    edit(folder)
    before = {one: one.is_file() and one.read_bytes() for one in folder.rglob("*")}
    zipped(path, [("a/1.jpg", b"new"), ("a/2.jpg", b"2")])
    with errors.raises(str(path), folder, "another folder"):
        unzip(path)
    assert {one: one.is_file() and one.read_bytes() for one in folder.rglob("*")} == before
    assert sorted(os.listdir(tmp_path)) == ["my", "my.zip"]


def test_what_is_added_while_a_newer_zip_is_unpacked_stays(tmp_path, monkeypatch):
    path = zipped(tmp_path / "my.zip", [("a/1.jpg", b"1")])
    folder = unzip(path).directory
    zipped(path, [("a/1.jpg", b"new")])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: add(folder) or usage)  # asked for after the first check
    with errors.raises(str(path), folder):
        unzip(path)
    assert (folder / "a" / "own.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("record", ["[]", '{"zip": 3}', '{"zip": [1, 2], "photos": 1, "refused": []}', "[" * 9999])
def test_a_crafted_record_is_none(tmp_path, record):
    path = zipped(tmp_path / "my.zip", [("a.jpg", b"1")])
    folder = unzip(path).directory
    (folder / ".unzipped.json").write_text(record)
    with errors.raises(str(path), folder):
        unzip(path)


def test_a_zip_of_another_program_is_read(tmp_path):
    """Streamed through a pipe, Info-ZIP cannot go back to write sizes before what they are of."""
    if not os.path.exists("/usr/bin/zip"):
        pytest.skip("there is no Info-ZIP")
    (tmp_path / "a.jpg").write_bytes(photo(tmp_path))
    made = subprocess.run(
        ["zip", "-q", "-", "a.jpg"], cwd=tmp_path, capture_output=True, check=True, stdin=subprocess.DEVNULL
    )
    (tmp_path / "my.zip").write_bytes(made.stdout)
    assert unzip(tmp_path / "my.zip").photos == 1
    assert (tmp_path / "my" / "a.jpg").read_bytes() == (tmp_path / "a.jpg").read_bytes()
