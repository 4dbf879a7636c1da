"""Photos on disk to codes in one call, against one photo after the other."""

import errno

import numpy as np
import pytest

import cib_jax
from cib_jax.data import photos
from cib_jax.errors import DataError
from cib_jax.inference.hasher import Hasher
from tests.commands import indexing


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    indexing.save_hasher(folder / "encoder")
    indexing.fill(folder / "photos", 7)
    (folder / "photos" / "a" / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def hasher(place):
    return Hasher.load(place / "encoder")


def test_a_folder_a_photo_and_several(place, hasher):
    listed = sorted(str(path) for path in (place / "photos").rglob("*.*"))
    good = [path for path in listed if "broken" not in path]
    codes = np.concatenate([hasher.encode(photos.decode(path, hasher.side)[None]) for path in good])
    reason = "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"
    bad = [(str(place / "photos" / "a" / "broken.jpg"), reason)]
    for asked, some, unreadable in (
        (place / "photos", slice(None), bad),
        (listed[::-1], slice(None, None, -1), bad),
        (good[2], slice(2, 3), []),
        ([], slice(0), []),
    ):
        found = cib_jax.encode_photos(hasher, asked)
        assert found.paths == good[some] and found.unreadable == unreadable
        np.testing.assert_array_equal(found.codes, codes[some])


def test_errors_name_the_argument(place, hasher, monkeypatch):
    with pytest.raises(DataError, match=r"^photos: .*nowhere"):
        cib_jax.encode_photos(hasher, place / "nowhere")

    def decode(path, size, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(photos, "decode", decode)
    with pytest.raises(DataError, match=r"^photos: .* cannot be read now \(input/output error\)"):
        cib_jax.encode_photos(hasher, place / "photos")
