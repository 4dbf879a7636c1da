"""Folders and lists of photos: what is found, its classes and splits, what is left out, and what is refused."""

import csv
import os
import shutil

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from cib_jax.data import photo_folder, photos
from cib_jax.data.dataset import no_bar
from cib_jax.data.photo_cache import PhotoCache
from tests.data import errors, pictures


def load(directory, cache, bar=no_bar, **options):
    return photo_folder.load_folder(str(directory), PhotoCache(cache, 16, bar=bar), **options)


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
    assert any(note.startswith("3 sub-folders") for note in source.notes)
    assert load(root, cache, labeled=False).train.labels is None


def test_where_a_photo_has_no_class_nothing_has(root, cache):
    fill(root, "cat/1.jpg", "dog/3.jpg", "4.jpg")
    source = load(root, cache)
    assert (source.train.labels, list(source.classes)) == (None, [])
    assert len(source.notes) == 1
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
    assert source.train.names == ["a/1.jpg", "b/2.jpg", "c/3.jpg"]
    assert [(bad.path, bad.reason) for bad in source.unreadable] == [("gone.jpg", "no such file or directory")]


def test_each_file_is_one_photo_however_many_links_lead_to_it(tmp_path):
    root, outside = tmp_path / "photos", tmp_path / "outside"
    fill(root, "b.jpg", "sub/c.jpg", "x.jpg")
    fill(outside, "o.jpg")
    os.link(root / "b.jpg", root / "a.jpg")
    os.link(root / "b.jpg", root / "sub" / "b.jpg")
    (root / "0.jpg").symlink_to(root / "sub" / "c.jpg")
    (root / "1.jpg").symlink_to(outside / "o.jpg")
    (root / "2.jpg").symlink_to(root / "1.jpg")
    (root / "3.jpg").symlink_to(root / "gone.jpg")
    os.link(outside / "o.jpg", outside / "twin.jpg")
    (root / "4.jpg").symlink_to(outside / "twin.jpg")
    assert photo_folder.walk_folder(str(root)).paths == ["1.jpg", "3.jpg", "a.jpg", "sub/c.jpg", "x.jpg"]
    # Copies are files of their own.
    shutil.copy(root / "x.jpg", root / "y.jpg")
    assert "y.jpg" in photo_folder.walk_folder(str(root)).paths


DERIVED = [
    "2020/@eaDir/x.jpg/SYNOPHOTO_THUMB_XL.jpg",
    "#recycle/gone.jpg",
    "@Recycle/gone.jpg",
    "$RECYCLE.BIN/S-1-5/$R1.jpg",
    "System Volume Information/x.jpg",
    "lost+found/x.jpg",
    "#snapshot/2020/x.jpg",
    "Catalog Previews.lrdata/0/x.jpg",
    "Photos Library.photoslibrary/resources/derivatives/x.jpg",
    "Photos Library.photoslibrary/database/x.jpg",
    "2020/._x.jpg",
]
ORIGINALS = ["2020/x.jpg", "Photos Library.photoslibrary/originals/0/x.jpg", "iPhoto.photolibrary/Masters/x.jpg"]


def test_thumbnails_previews_and_deleted_files_are_left_out_and_said(tmp_path):
    fill(tmp_path, *DERIVED, *ORIGINALS)
    found = photo_folder.walk_folder(str(tmp_path))
    assert found.paths == sorted(ORIGINALS)
    assert len(found.derived) == len(DERIVED) - 1 and any(f": {len(found.derived)}," in note for note in found.notes())
    # Given by name, such a folder is a folder of photos, and in a library only the originals are.
    assert photo_folder.walk_folder(str(tmp_path / "#recycle")).paths == ["gone.jpg"]
    assert photo_folder.walk_folder(str(tmp_path / "Photos Library.photoslibrary")).paths == ["originals/0/x.jpg"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("*.png", ["a/1.jpg", "a/b/2.jpg", "c/4.JPG"]),
        (["b"], ["a/1.jpg", "c/3.png", "c/4.JPG"]),
        (["a/", ""], ["c/3.png", "c/4.JPG"]),
        (["a/*.jpg", "3*"], ["c/4.JPG"]),
        (["c/*"], ["a/1.jpg", "a/b/2.jpg"]),
        (["*.jpg"], ["c/3.png", "c/4.JPG"]),
        ([""], ["a/1.jpg", "a/b/2.jpg", "c/3.png", "c/4.JPG"]),
    ],
)
def test_excluded_files_and_folders_are_left_out(tmp_path, exclude, left):
    fill(tmp_path, "a/1.jpg", "a/b/2.jpg", "c/3.png", "c/4.JPG")
    assert photo_folder.walk_folder(str(tmp_path), photo_folder.parse_patterns(exclude)).paths == left


def test_what_cannot_be_read_is_listed_with_its_reason(root, cache):
    fill(root, *(f"{number}.jpg" for number in range(5)))
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("hello")
    whole = pictures.content(pictures.smooth(200, 200), "JPEG")
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "notes.txt").write_text("x")
    (root / "phone.JXL").write_bytes(b"x")
    (root / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    source = load(root, cache)
    assert len(source.train) == 5
    reasons = {bad.path: bad.reason for bad in source.unreadable}
    assert reasons.keys() == {"empty.jpg", "text.jpg", "cut.jpg", "phone.HEIC"}
    assert reasons["empty.jpg"] == "0 bytes" and reasons["cut.jpg"].startswith("truncated")
    assert "HEIC" in reasons["phone.HEIC"]
    assert any("1 .txt" in note and "1 .jxl" in note and "converted" in note for note in source.notes)


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
    with errors.raises("config.data.dir", root, "permission denied"):
        load(root, cache)


def test_what_is_no_folder_of_photos_is_refused(root, cache):
    with errors.raises("config.data.dir", "''"):
        load("", cache)
    with errors.raises("config.data.dir", root):
        load(root, cache)
    root.mkdir()
    with errors.raises("config.data.dir", root, "(nothing)"):
        load(root, cache)
    (root / "a.txt").write_text("x")
    with errors.raises("config.data.dir", root, "(1 .txt)"):
        load(root, cache)
    with errors.raises("config.data.dir", root / "a.txt", "config.data.name=list"):
        load(root / "a.txt", cache)
    fill(root, "1.jpg", "2.jpg")
    (root / "3.jpg").write_bytes(b"")
    with errors.raises("config.data.dir", root, "got 2", "(the first: 3.jpg: 0 bytes)"):
        load(root, cache)


def test_the_bar_advances_for_every_photo(root, cache):
    fill(root, "1.png", "2.png", "3.png")
    calls = []

    class Bar:
        def __init__(self, description, total):
            calls.append((description, total))

        def __enter__(self):
            return calls.append

        def __exit__(self, *_):
            pass

    load(root, cache, bar=Bar)
    assert calls[0][1] == 3 and sum(calls[1:]) == 3


def test_upright_photos_and_one_pixel_wide_ones(root, cache):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    pictures.write(root / "turned.jpg", pictures.smooth(40, 20), exif=exif)
    pictures.write(root / "thin.png", PIL.Image.new("L", (1, 500), 90))
    pictures.write(root / "wide.png", PIL.Image.new("RGBA", (20_000, 2), (0, 0, 0, 0)))
    source = load(root, cache)
    assert source.train.names == ["thin.png", "turned.jpg", "wide.png"]
    assert (source.train.images[0] == 90).all() and (source.train.images[2] == 255).all()


@pytest.fixture
def listed(tmp_path):
    for number in range(6):
        pictures.write(tmp_path / "in here" / f"{number}.png", pictures.colored(number, 6))
    return tmp_path


PATHS = [f"in here/{number}.png" for number in (3, 1, 5, 0)]


def write_list(listed, columns, kind):
    path = listed / f"list.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        rows = zip(*columns.values(), strict=True)
        path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def load_list(path, **options):
    return photo_folder.load_list(str(path), PhotoCache(path.parent / "cache", 16), **options)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_photos_come_in_the_order_of_the_list_with_their_labels(listed, kind):
    source = load_list(write_list(listed, {"path": PATHS, "label": ["b", "a", "b", "c"], "other": [1, 2, 3, 4]}, kind))
    assert source.train.names == PATHS
    assert (list(source.classes), source.train.labels.tolist()) == (["a", "b", "c"], [1, 0, 1, 2])
    for index, name in enumerate(PATHS):
        assert np.array_equal(source.train.images[index], photos.decode(listed / name, 16))
    assert source.roles is None


def test_without_labels_there_are_none(listed):
    assert load_list(write_list(listed, {"path": PATHS}, "csv")).train.labels is None
    assert (
        load_list(write_list(listed, {"path": PATHS, "label": list("abab")}, "csv"), labeled=False).train.labels is None
    )


def test_the_list_may_give_the_splits_and_unreadable_photos_leave_theirs(listed):
    (listed / "in here" / "1.png").write_bytes(b"")
    columns = {
        "path": [*PATHS, "in here/2.png", str(listed / "in here" / "4.png"), "gone.png"],
        "label": list("abcabca"),
    }
    columns["split"] = ["train", "train", "query", "database", "train", "train_only", "query"]
    source = load_list(write_list(listed, columns, "csv"))
    assert {role: part.names for role, part in source.roles.items()} == {
        "train": ["in here/3.png", "in here/2.png"],
        "query": ["in here/5.png"],
        "database": ["in here/0.png"],
        "train_only": [str(listed / "in here" / "4.png")],
    }
    assert source.roles["train"].labels.tolist() == [0, 1]
    assert [(bad.path, bad.reason) for bad in source.unreadable] == [
        ("in here/1.png", "0 bytes"),
        ("gone.png", "no such file or directory"),
    ]


def test_a_csv_as_spreadsheets_write_it(listed):
    path = listed / "list.csv"
    path.write_bytes('\ufeffpath,label\r\n"in here/3.png","a, b"\r\nin here/1.png,ü\r\nin here/5.png,ü\r\n'.encode())
    source = load_list(path)
    assert (list(source.classes), source.train.labels.tolist()) == (["a, b", "ü"], [0, 1, 1])


@pytest.mark.parametrize(
    "content",
    [
        b"path,label,,\n{0},a,,\n{1},b,,\n{2},a,,\n",
        b"path,tag,label,tag\n{0},1,a,x\n{1},2,b,y\n{2},3,a,z\n",
        b"path, label, size\n{0}, a, 1\n{1}, b, 2\n{2},a ,3\n",
        b"size, path, label\n1, {0}, a\n2, {1}, b\n3, {2}, a\n",
        "path,label\r\n{0},a\r\n{1},b\r\n{2},a\r\n".encode("utf-16"),
        "\ufeffpath,label\n{0},a\n{1},b\n{2},a\n".encode("utf-16-be"),
        "\ufeffpath,label\n{0},a\n{1},b\n{2},a".encode(),
        b'path,label,caption\n{0},a,"1\n2"\n{1},b,"' + b"3\n" * 600_000 + b'"\n{2},a,4\n',
    ],
    ids=["trailing commas", "a name twice", "spaces", "padded path", "UTF-16", "big-endian", "BOM", "a long cell"],
)
def test_a_csv_as_programs_write_it(listed, content):
    path = listed / "list.csv"
    for number, name in enumerate(PATHS[:3]):
        for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
            content = content.replace(f"{{{number}}}".encode(encoding), name.encode(encoding))
    path.write_bytes(content)
    source = load_list(path)
    assert source.train.names == PATHS[:3]
    assert (list(source.classes), source.train.labels.tolist()) == (["a", "b"], [0, 1, 0])


def test_spaces_belong_to_paths_and_line_breaks_to_quoted_ones(listed):
    names = [" a.png", "b .png", "c\nd.png"]
    for number, name in enumerate(names):
        pictures.write(listed / name, pictures.colored(number, 6))
    (listed / "list.csv").write_text("path\n" + "".join(f'"{name}"\n' for name in names))
    assert load_list(listed / "list.csv").train.names == names


def test_csv_rows_are_those_of_the_standard_library(tmp_path):
    rows = [[f"{number}.png", f'A "long" caption,\nnumber {number}', ""] for number in range(40_000)]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "caption", "label"], *rows])
    assert (tmp_path / "list.csv").stat().st_size > 2**20
    assert photo_folder.read_list_paths(str(tmp_path / "list.csv")) == [row[0] for row in rows]


def test_an_impossible_name_is_unreadable(listed):
    (listed / "list.csv").write_bytes("\n".join(["path", "a\0.png", *PATHS, ""]).encode())
    source = load_list(listed / "list.csv")
    assert source.train.names == PATHS
    assert [(bad.path, bad.reason) for bad in source.unreadable] == [("a\0.png", "embedded null byte")]


@pytest.mark.parametrize("kind", ["large", "view", "dictionary"])
def test_texts_of_a_parquet_may_have_any_type(listed, kind):
    types = {"large": pyarrow.large_string(), "view": pyarrow.string_view()}
    paths = pyarrow.array(PATHS).dictionary_encode() if kind == "dictionary" else pyarrow.array(PATHS, types[kind])
    source = load_list(write_list(listed, {"path": paths, "other": [{"path": "x"}] * 4}, "parquet"))
    assert source.train.names == PATHS


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ({"label": [["x"], ["y"], ["x"], []]}, ["row 1", "'labels'"]),
        ({"label": [{"a": 1}] * 4}, ["row 1"]),
        ({"label": [1.0, float("nan"), 2.0, 1.0]}, ["row 2", "empty"]),
        ({"label": [b"x"] * 4}, ["row 1"]),
        ({"split": ["train", None, "train", "query"]}, ["row 2", "None"]),
    ],
)
def test_cells_of_a_parquet_that_are_no_class_or_split_are_refused(listed, columns, values):
    path = write_list(listed, {"path": PATHS, **columns}, "parquet")
    with errors.raises("config.data.dir", path, *values):
        load_list(path)


def test_a_parquet_with_a_column_twice_is_refused(listed):
    table = pyarrow.table([PATHS, PATHS], names=["path", "path"])
    pyarrow.parquet.write_table(table, listed / "list.parquet")
    with errors.raises("config.data.dir", "list.parquet", "'path'"):
        load_list(listed / "list.parquet")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("file,label\na,b\n", ["'path'", "'file', 'label'"]),
        ("path\n", []),
        ("", ["Empty CSV file"]),
        ("path,label\na\n", ["CSV parse error", "Row #2"]),
        ("path;label\na;b\n", ["path;label"]),
        ("path,path\na,b\n", ["'path'"]),
        ("path,label\na.png,x\n./a.png,x\n", ["'./a.png'", "rows 1 and 2"]),
        ("path,label\na.png,x\n.//b/../a.png,x\n", ["rows 1 and 2"]),
        ('path,label\na.png,x\nb.png,"y\nc.png,z\n', ["row 2"]),
        ('path\na.png\n"b.png\nc.png', ["row 2"]),
        ("path,label\na.png,x\nb.png,NaN\n", ["row 2", "label"]),
        ("path,label\na.png,x\n,\n", ["row 2"]),
        ("path,label\na.png,x\na.png,x\n", ["'a.png'"]),
        ("path,label\na.png,x\nb.png,\n", ["row 2", "label"]),
        ("path,labels\na.png,\n", ["'labels'"]),
        ("path,split\na.png,learn\n", ["row 1", "'learn'", "train, database, query"]),
        ("path,label\na.png,x\n,x\n", ["row 2", "''"]),
        ("path,label\na.png,x\nb.png,x\n", ["got 0", "2 unreadable"]),
    ],
)
def test_a_bad_list_is_refused(listed, text, values):
    path = listed / "list.csv"
    path.write_text(text)
    with errors.raises("config.data.dir", path, *values):
        load_list(path)


def test_what_is_no_list_is_refused(listed):
    for name, content in (
        ("list.txt", b"path\n"),
        ("list.parquet", b"no"),
        ("latin.csv", "path\na.png\nä.png\n".encode("latin1")),
        ("latin_header.csv", "path,größe\na.png,1\n".encode("latin1")),
        ("half.csv", "path\na.png\n".encode("utf-16")[:-1]),
    ):
        (listed / name).write_bytes(content)
        with errors.raises("config.data.dir", name):
            load_list(listed / name)
    with errors.raises("config.data.dir", "nothing.csv"):
        load_list(listed / "nothing.csv")
