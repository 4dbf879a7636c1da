"""Collages on photos of one color each: labels, splits that share no photo, the same files again, and reading them."""

import numpy as np
import PIL.Image
import pytest

from benchmarks import collages
from cib_jax.data import photo_folder
from cib_jax.data.photo_cache import PhotoCache

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(24):
        path = folder / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (9 + number, 20), (10 * number, 255 - 10 * number, 120)).save(path)
    return folder


def test_a_collage_shows_its_parts_and_has_their_labels(photos):
    drawn = collages.draw(photos, 12, 4, seed=0)
    assert [collage.split for collage in drawn] == ["train"] * 12 + ["query"] * 4
    assert {len(collage.parts) for collage in drawn} == {2, 3, 4}
    for collage in drawn:
        covered, canvas = np.zeros((collages.SIDE, collages.SIDE), int), np.asarray(collages.compose(collage))
        for part in collage.parts:
            place = np.s_[part.top : part.top + part.height, part.left : part.left + part.width]
            covered[place] += 1
            assert (canvas[place] == PIL.Image.open(part.photo).getpixel((0, 0))).all()
        assert (covered == 1).all()
        assert collage.labels == [
            name for name in CLASSES if any(part.photo.parent.name == name for part in collage.parts)
        ]


def test_no_photo_is_in_a_query_and_in_the_database(photos):
    shown = {"train": set(), "query": set()}
    for collage in collages.draw(photos, 40, 20, seed=1):
        shown[collage.split] |= {part.photo for part in collage.parts}
    assert (len(shown["train"]), len(shown["query"])) == (16, 8)
    assert not shown["train"] & shown["query"]


def test_too_few_photos_are_refused(photos):
    with pytest.raises(ValueError, match="got 1 of 24"):
        collages.draw(photos, 24, 1, seed=0)


def test_the_list_is_read_with_its_labels_and_splits(photos, tmp_path):
    drawn = collages.draw(photos, 6, 3, seed=2)
    for folder in ("once", "again"):
        collages.write(tmp_path / folder, collages.draw(photos, 6, 3, seed=2))
    files = [sorted(path for path in (tmp_path / folder).rglob("*.*")) for folder in ("once", "again")]
    assert len(files[0]) == 10 and all(
        one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True)
    )
    source = photo_folder.load_list(str(tmp_path / "once" / collages.LIST), PhotoCache(tmp_path / "cache", 16))
    roles = source.roles
    for split in ("train", "query"):
        expected = [collage.labels for collage in drawn if collage.split == split]
        assert [[source.classes[i] for i in np.flatnonzero(row)] for row in roles[split].labels] == expected
