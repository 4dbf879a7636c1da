"""Near-duplicates: planted copies are found and nothing else; without confirming, all that a plain loop joins."""

import io
import json

import numpy as np
import PIL.Image
import pytest
import rich.console

from cib_jax.commands import search
from cib_jax.commands.search import duplicates
from cib_jax.errors import ConfigError
from cib_jax.inference.hasher import Hasher
from tests.commands import indexing
from tests.data import pictures

COPIES = {
    "a.jpg": ["a at 60.jpg", "half.jpg", "as/a.png"],
    "b.png": ["b.webp"],
    "c.jpg": ["ü/c [1].jpg"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("duplicates")
    indexing.save_hasher(folder / "encoder", bits=64)
    for number in range(40):
        pictures.write(folder / "photos" / f"other {number}.jpg", pictures.smooth(200, 150, seed=100 + number))
    for seed, (name, copies) in enumerate(COPIES.items()):
        image = pictures.smooth(400, 300, seed=seed)
        for at, copy in enumerate([name, *copies]):
            size = (200, 150) if copy == "half.jpg" else image.size
            options = {"quality": 95 - 15 * at} if copy.endswith("jpg") else {}
            pictures.write(folder / "photos" / copy, image.resize(size, PIL.Image.Resampling.BICUBIC), **options)
    indexing.run(folder / "i", folder / "photos", workdir=folder / "encoder")
    return folder


def find(place, **options):
    console = rich.console.Console(file=io.StringIO(), width=100)
    found = duplicates(place / "i", console=console, **options)
    return found, console.file.getvalue()


def grouped(found):
    return sorted(sorted(photo.path for _, photo in group) for group in found)


def codes_of(place):
    held = indexing.expected(place / "photos", Hasher.load(place / "encoder"))
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


@pytest.mark.parametrize("radius", [6, 16, 64])
def test_planted_copies_are_found_and_only_they(place, radius):
    found, told = find(place, radius=radius)
    assert grouped(found) == sorted(sorted([name, *copies]) for name, copies in COPIES.items())
    assert len(found[0]) == 4, "the largest first"
    assert "3 groups of copies of one picture, 8 photos of 48" in told and "ü/c [1].jpg" in told


@pytest.mark.parametrize("radius", [0, 1, 4, 10])
def test_unconfirmed_groups_are_those_of_a_plain_loop(place, radius):
    codes = codes_of(place)
    found, told = find(place, radius=radius, confirm=False)
    assert grouped(found) == chained(codes, radius)
    assert f"in at most {radius} bit" in told and "photos of like things" in told
    for group in found:
        first = codes[group[0][1].path]
        assert [distance for distance, _ in group] == [(codes[one.path] ^ first).bit_count() for _, one in group]
    assert [len(group) for group in found] == sorted(map(len, found), reverse=True)


def test_photos_are_joined_only_where_codes_and_looks_both_do():
    """Of a chain of codes, the ends look alike, but what is between them does not."""
    codes = np.array([0b000, 0b001, 0b011, 0b111], np.uint8)[:, None]
    looks = np.zeros((4, 8), np.uint8)
    looks[1:3] = 255
    assert search._alike(codes, looks, 1) == [[1, 2]]
    assert search._alike(codes, looks, 3) == [[0, 3], [1, 2]]
    assert search._alike(codes, np.zeros((4, 8), np.uint8), 1) == [[0, 1, 2, 3]]


def test_a_sixteenth_of_the_bits_is_the_default_and_json_says_the_same(place, monkeypatch):
    monkeypatch.setattr(search, "_AT_ONCE", 2)
    found, told = find(place, form="json")
    again, _ = find(place, radius=4)
    assert grouped(found) == grouped(again)
    lines = [json.loads(line) for line in told.splitlines()]
    assert [line["group"] for line in lines] == list(range(1, len(found) + 1))
    assert [[(one["distance"], one["path"], one["id"]) for one in line["photos"]] for line in lines] == [
        [(distance, photo.path, photo.id) for distance, photo in group] for group in found
    ]


def test_a_contact_sheet_has_a_row_for_each_group(place, tmp_path):
    _, told = find(place, radius=6, show=tmp_path / "sheet.png")
    assert PIL.Image.open(tmp_path / "sheet.png").size == (8 + 4 * 120, 30 + 3 * 156)
    assert f"Drawn in {tmp_path / 'sheet.png'}" in told


def test_where_there_are_none_it_says_so(place, tmp_path):
    indexing.fill(tmp_path / "photos", 3)
    indexing.run(tmp_path / "i", tmp_path / "photos", workdir=place / "encoder")
    found, told = find(tmp_path, radius=0, show=tmp_path / "sheet.png")
    assert found == [] and "0 groups of copies" in told and not (tmp_path / "sheet.png").exists()


def test_mistakes_are_refused(place):
    with pytest.raises(ConfigError, match="--radius: wanted 0 bits or more, got -1"):
        find(place, radius=-1)
    with pytest.raises(ConfigError, match="--format: 'x' is not one of"):
        find(place, form="x")
    with pytest.raises(ConfigError, match=r"--show: x.gif is no name of a PNG"):
        find(place, show="x.gif")
