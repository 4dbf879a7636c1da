"""Copies of pictures in an index: planted ones are found and nothing else; groups of near codes by a plain loop."""

import csv
import hashlib
import io
import json
import shutil
import sys

import PIL.Image
import PIL.ImageOps
import pytest
import rich.console

import cib_jax as cib
from cib_jax.commands import duplicates as duplicates_lib
from cib_jax.commands.duplicates import duplicates
from cib_jax.errors import ConfigError, DataError, SearchError
from cib_jax.inference.hasher import Hasher
from tests.commands import indexing
from tests.data import pictures
from tests.test_console import Terminal

COPIES = {
    "a.jpg": ["a at 60.jpg", "half.jpg", "as/a.png"],
    "b.png": ["b.webp"],
    "c.jpg": ["ü/c [1].jpg"],
}


def fill(folder, others):
    """Makes an index of the planted copies and so many other photos, each of which may be compared with each."""
    indexing.save_hasher(folder / "encoder", bits=64)
    for number in range(others):
        pictures.write(folder / "photos" / f"other {number}.jpg", pictures.smooth(200, 150, seed=100 + number))
    for seed, (name, copies) in enumerate(COPIES.items()):
        image = pictures.smooth(400, 300, seed=seed)
        for at, copy in enumerate([name, *copies]):
            size = (200, 150) if copy == "half.jpg" else image.size
            options = {"quality": 95 - 15 * at} if copy.endswith("jpg") else {}
            pictures.write(folder / "photos" / copy, image.resize(size, PIL.Image.Resampling.BICUBIC), **options)
    indexing.run(folder / "i", folder / "photos", workdir=folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("duplicates"), 12)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A smaller index, for tests of the output."""
    return fill(tmp_path_factory.mktemp("few"), 2)


def find(place, **options):
    console = rich.console.Console(file=io.StringIO(), width=100)
    found = duplicates(place / "i", console=console, **options)
    return found, console.file.getvalue()


def grouped(found):
    return sorted(sorted(photo.path for _, photo in group) for group in found)


@pytest.fixture(scope="module")
def codes(copies):
    held = indexing.expected(copies / "photos", Hasher.load(copies / "encoder"))
    return {name: int.from_bytes(values[2], "big") for name, values in held.items()}


def chained(codes, radius):
    """Groups by a plain loop: whoever is near to one of a group belongs to it."""
    left, groups = sorted(codes), []
    while left:
        group, waiting = [], [left.pop(0)]
        while waiting:
            group.append(one := waiting.pop())
            near = [other for other in left if (codes[one] ^ codes[other]).bit_count() <= radius]
            left = [other for other in left if other not in near]
            waiting += near
        groups.append(sorted(group))
    return sorted(group for group in groups if len(group) > 1)


@pytest.mark.parametrize("radius", [None, 16])
def test_planted_copies_are_found_and_only_they(copies, radius):
    found, told = find(copies, radius=radius)
    assert grouped(found) == sorted(sorted([name, *copies]) for name, copies in COPIES.items())
    assert len(found[0]) == 4, "the largest first"
    assert (
        "3 groups of copies of one picture, 8 photos of 20, 0 exact copies among them" in told and "ü/c [1].jpg" in told
    )


def test_groups_do_not_depend_on_the_memory(few, monkeypatch):
    expected = grouped(find(few)[0])
    for name, most in {"KEPT_BYTES": 0, "KEPT_FEATURES": 1, "KEPT_PIXELS": 1}.items():
        monkeypatch.setattr(duplicates_lib, name, most)
    assert grouped(find(few)[0]) == expected


@pytest.mark.parametrize("radius", [0, 1, 4, 10])
def test_unconfirmed_groups_are_those_of_a_plain_loop(copies, codes, radius):
    found, told = find(copies, radius=radius, confirm=False)
    assert grouped(found) == chained(codes, radius)
    assert f"in at most {radius} bit" in told and "photos of similar content" in told
    for group in found:
        first = codes[group[0][1].path]
        assert [distance for distance, _ in group] == [(codes[one.path] ^ first).bit_count() for _, one in group]
    assert [len(group) for group in found] == sorted(map(len, found), reverse=True)


@pytest.mark.parametrize("format", ["json", "csv"])
def test_bars_beside_json_and_csv_are_on_a_terminals_stderr(few, monkeypatch, format):
    expected = find(few, format=format)[1]
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert find(few, format=format)[1] == expected
    assert "Looking at photos" in sys.stderr.getvalue()
    sys.stderr.truncate(0)
    cib.Collection.open(few / "i").duplicates(progress=False)
    assert sys.stderr.getvalue().strip("\0") == ""


def test_lines_of_json_and_csv_have_one_photo_each(few, monkeypatch):
    monkeypatch.setattr(duplicates_lib, "PAGE", 2)
    found, told = find(few, format="json")
    lines = [json.loads(line) for line in told.splitlines()]
    assert [(line["group"], line["distance"], line["path"], line["id"], line["bytes"]) for line in lines] == [
        (number, distance, photo.path, photo.id, photo.size)
        for number, group in enumerate(found, 1)
        for distance, photo in group
    ]
    _, told = find(few, format="csv")
    rows = list(csv.DictReader(io.StringIO(told)))
    assert rows == [{name: str(value) for name, value in line.items()} for line in lines]


def test_the_largest_photo_is_kept_and_exact_copies_are_named(few, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(few / "photos", photos)
    shutil.copy(photos / "half.jpg", photos / "=half.jpg")
    shutil.copy(photos / "other 1.jpg", photos / "-again.jpg")
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    indexing.run(tmp_path / "i", photos, workdir=few / "encoder")
    _, told = find(tmp_path, format="json")
    groups = {}
    for line in map(json.loads, told.splitlines()):
        groups.setdefault(line["group"], []).append(line)
    (first,) = [lines for lines in groups.values() if any(line["path"] == "half.jpg" for line in lines)]
    assert first[0]["role"] == "keep" and first[0]["width"] == 400 == max(line["width"] for line in first)
    assert first[0]["bytes"] == max(line["bytes"] for line in first if line["width"] == 400)
    halves = [line for line in first if line["path"].endswith("half.jpg")]
    assert sorted(line["role"] for line in halves) == ["exact copy", "similar"]
    digest = hashlib.sha256((photos / "half.jpg").read_bytes()).hexdigest()
    assert {line["sha256"] for line in halves} == {digest}
    (pair,) = [lines for lines in groups.values() if any(line["path"] == "-again.jpg" for line in lines)]
    assert [line["role"] for line in pair] == ["keep", "exact copy"]
    _, told = find(tmp_path, format="csv")
    assert {"./=half.jpg", "./-again.jpg"} <= {row["path"] for row in csv.DictReader(io.StringIO(told))}
    _, told = find(tmp_path)
    assert "exact copy" in told and "2 exact copies among them" in told
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before


@pytest.mark.parametrize("edge", [(0, 0, 0, 60), 30])
def test_a_photo_with_a_bar_or_a_border_is_kept_only_if_its_original_is_small(few, tmp_path, edge):
    photos, image = tmp_path / "photos", pictures.scene(0, 480, 360)
    sizes = {"original.jpg": (480, 360), "half.jpg": (240, 180)}
    for name, size in sizes.items():
        pictures.write(photos / name, image.resize(size))
    pictures.write(photos / "added.jpg", PIL.ImageOps.expand(image, edge, "white"))
    indexing.run(tmp_path / "i", photos, workdir=few / "encoder")
    (found,) = find(tmp_path)[0]
    assert [photo.path for _, photo in found] == ["original.jpg", "added.jpg", "half.jpg"] and found[0][0] == 0
    (photos / "original.jpg").unlink()
    indexing.run(tmp_path / "i", photos, workdir=few / "encoder")
    (found,) = find(tmp_path)[0]
    assert [photo.path for _, photo in found] == ["added.jpg", "half.jpg"]


def test_photos_of_a_reference_are_found_in_the_index(copies, tmp_path):
    other = tmp_path / "other"
    image = PIL.Image.open(copies / "photos" / "other 7.jpg")
    pictures.write(other / "card.png", image.resize((100, 75)))
    pictures.write(other / "new.jpg", pictures.smooth(300, 200, seed=999))
    (other / "broken.jpg").write_bytes(b"no picture")
    found, told = find(copies, reference=other)
    assert [[photo.path for _, photo in group] for group in found] == [[str(other / "card.png"), "other 7.jpg"]]
    assert "reference" in told and "broken.jpg cannot be read" in told
    assert grouped(find(copies, reference=other / "card.png")[0]) == grouped(found)
    (line, *_) = [json.loads(line) for line in find(copies, reference=other, format="json")[1].splitlines()][1:]
    assert (line["role"], line["path"], line["width"]) == ("reference", str(other / "card.png"), 100)
    assert list(csv.DictReader(io.StringIO(find(copies, reference=other / "new.jpg", format="csv")[1]))) == []
    assert find(copies, reference=other / "new.jpg", format="csv")[1].startswith("group,role,root,path,distance,id,")


def test_a_reference_named_from_the_present_folder_has_exact_copies(copies, tmp_path, monkeypatch):
    """A photo of the same relative path in the index is another one."""
    (tmp_path / "photos").mkdir()
    shutil.copy(copies / "photos" / "other 7.jpg", tmp_path / "other 3.jpg")
    absolute = find(copies, reference=tmp_path / "other 3.jpg", format="json")[1]
    monkeypatch.chdir(tmp_path)
    assert find(copies, reference="other 3.jpg", format="json")[1] == absolute
    roles = {line["path"]: line["role"] for line in map(json.loads, absolute.splitlines())}
    assert roles == {str(tmp_path / "other 3.jpg"): "reference", "other 7.jpg": "exact copy"}


@pytest.mark.parametrize(
    ("options", "error", "field"),
    [
        ({"radius": -1}, SearchError, "--radius"),
        ({"format": "xml"}, ConfigError, "--format"),
        ({"show": "x.jpg"}, ConfigError, "--show"),
        ({"reference": "nowhere"}, DataError, "--reference"),
    ],
)
def test_mistakes_are_refused(copies, options, error, field):
    with pytest.raises(error) as refused:
        find(copies, **options)
    assert refused.value.field == field


def test_a_contact_sheet_has_a_row_for_each_group(few, tmp_path):
    _, told = find(few, radius=6, show=tmp_path / "sheet.png")
    assert PIL.Image.open(tmp_path / "sheet.png").size == (8 + 4 * 120, 30 + 3 * 156)
    assert f"Drawn in {tmp_path / 'sheet.png'}" in told


def test_where_there_are_none_it_says_so(copies, tmp_path):
    indexing.fill(tmp_path / "photos", 3)
    indexing.run(tmp_path / "i", tmp_path / "photos", workdir=copies / "encoder")
    found, told = find(tmp_path, radius=0, show=tmp_path / "sheet.png")
    assert found == [] and "0 groups of copies" in told and not (tmp_path / "sheet.png").exists()
