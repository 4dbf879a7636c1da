"""Collections of photos against plain loops over their codes."""

import dataclasses
import datetime
import shutil

import jax
import numpy as np
import pytest

import cib_jax as cib
from cib_jax.errors import IndexFolderError, SavedHasherError, SearchError
from cib_jax.storage import collection as collection_lib
from cib_jax.storage.collection import Collection
from cib_jax.storage.photo_table import IndexMetadata, PhotoTable, Row, key_of

COUNT = 30
RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 256, (COUNT, 1), np.uint8)
ROWS = [Row(f"{n:02}.jpg", 10 + n, 1000 + n, CODES[n].tobytes(), 40 + n, 30, b"jpeg %d" % n) for n in range(COUNT)]


@pytest.fixture(scope="module")
def hashers():
    """Two encoders of one network with other weights."""
    made = cib.Hasher(*cib.create_encoder(jax.random.key(0), backbone="convnet", bits=8, image_size=16, hidden=4))
    return made, dataclasses.replace(made, params=jax.tree.map(lambda leaf: leaf + 1, made.params))


def make(folder, hasher, rows=ROWS):
    metadata = IndexMetadata("/photos", collection_lib.encoder_identity(hasher))
    table = PhotoTable.create(str(folder), metadata, collection_lib.hasher_bytes(hasher))
    table.put([*rows, Row("broken.jpg", 3, 4, reason="truncated")])
    return table


def paths(collection, hits):
    return [
        (hit.distance, photo.path) for hit, photo in zip(hits, collection.photos([h.number for h in hits]), strict=True)
    ]


def by_distance(code):
    """Distance and path of all photos, ties in the order of keys."""
    ordered = sorted(ROWS, key=lambda row: key_of(row.path))
    return sorted((((code[0] ^ row.code[0]).bit_count(), row.path) for row in ordered), key=lambda pair: pair[0])


def test_searches_are_plain_loops(tmp_path, hashers):
    make(tmp_path / "i", hashers[0])
    collection = Collection.open(tmp_path / "i")
    queries = RNG.integers(0, 256, (3, 1), np.uint8)
    expected = [by_distance(query.tolist()) for query in queries]
    assert "30 photos" in str(collection) and "jpeg" not in str(collection.photos([0]))
    for k in (1, 7, COUNT + 5):
        assert [paths(collection, hits) for hits in collection.nearest(queries, k)] == [all_[:k] for all_ in expected]
    found = collection.within(queries, 3)
    assert [paths(collection, hits) for hits in found] == [[p for p in all_ if p[0] <= 3] for all_ in expected]
    # Logits of one size: the asymmetric distance is the Hamming distance, so the order stays.
    assert collection.reranked(np.asarray(cib.unpack_bits(queries)), found) == found
    for group in collection.groups(0):
        assert len(group) > 1 and len({collection.codes[number].tobytes() for number in group}) == 1


def test_photos_are_found_by_id_and_changes_by_renewing(tmp_path, hashers):
    table = make(tmp_path / "i", hashers[0])
    collection = Collection.open(tmp_path / "i")
    assert (len(collection), collection.bits, collection.side, collection.root) == (COUNT, 8, 16, "/photos")
    photos = {photo.path: photo for photo in collection.photos(range(COUNT))}
    for row in ROWS:
        photo = photos[row.path]
        assert photo[2:] == (row.size, row.modified_ns, row.width, row.height, row.thumbnail, "")
        assert collection.photos([collection.number_of(photo.id)], thumbnails=False) == [photo._replace(thumbnail=b"")]
        assert collection.codes[collection.number_of(photo.id)].tobytes() == row.code
    for nothing in ("", "xyz", "0" * 16, "0" * 15, "é" * 16, "00.jpg"):
        assert collection.number_of(nothing) is None
    assert collection.photos([]) == [] and collection.renewed() is collection
    table.remove([key_of("04.jpg")])
    renewed = collection.renewed()
    assert len(renewed) == COUNT - 1 and renewed.number_of(photos["04.jpg"].id) is None
    assert collection.photos([collection.number_of(photos["04.jpg"].id)]) == [photos["04.jpg"]]
    table.record(images="/elsewhere", exclude=[])
    moved = renewed.renewed()
    assert moved.root == "/elsewhere" and len(moved) == COUNT - 1 and moved.renewed() is moved


def day(*date):
    return int(datetime.datetime(*date).timestamp()) * 10**9


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        ({"folder": "a"}, ["a/1.jpg", "a/b/2.jpg", "a/\udcff.jpg"]),
        ({"folder": "/photos/a/b/"}, ["a/b/2.jpg"]),
        ({"folder": "."}, ["a/1.jpg", "a/b/2.jpg", "a/\udcff.jpg", "ab/3.jpg"]),
        ({"after": "2024"}, ["a/\udcff.jpg", "ab/3.jpg"]),
        ({"after": "2023-12-31"}, ["a/b/2.jpg", "a/\udcff.jpg", "ab/3.jpg"]),
        ({"before": "2024-01"}, ["a/1.jpg", "a/b/2.jpg"]),
        ({"after": "2023-12-31", "before": "2024-07-01", "folder": "a"}, ["a/b/2.jpg", "a/\udcff.jpg"]),
    ],
)
def test_a_collection_of_one_folder_and_time(tmp_path, hashers, chosen, left):
    times = {"a/1.jpg": (2020, 5, 1), "a/b/2.jpg": (2023, 12, 31, 23, 59), "a/\udcff.jpg": (2024, 1, 1)}
    times["ab/3.jpg"] = (2024, 7, 1)
    rows = [Row(path, 9, day(*time), bytes([n])) for n, (path, time) in enumerate(times.items())]
    make(tmp_path / "i", hashers[0], rows)
    some = Collection.open(tmp_path / "i").filtered(**chosen)
    assert sorted(photo.path for photo in some.photos(range(len(some)))) == sorted(left)
    hits = some.nearest(np.array([[2]], np.uint8), 9)[0]
    code = {row.path: row.code[0] for row in rows}
    expected = sorted((int(code[path] ^ 2).bit_count(), path) for path in left)
    assert sorted(paths(some, hits)) == expected


@pytest.mark.parametrize(
    ("field", "chosen"),
    [
        ("--folder", {"folder": "nowhere"}),
        ("--after", {"after": "2999"}),
        ("--after", {"after": "May"}),
        ("--before", {"before": "2024-13-01"}),
        *[("--before", {"before": date}) for date in ("2024-1", "2024-06-1", "2024-12-", "202", "2024-1-01")],
    ],
)
def test_a_folder_or_a_time_without_photos_is_refused(tmp_path, hashers, field, chosen):
    make(tmp_path / "i", hashers[0])
    with pytest.raises(SearchError) as error:
        Collection.open(tmp_path / "i").filtered(**chosen)
    assert error.value.field == field and next(iter(chosen.values())) in str(error.value)


def test_temporary_files_that_cannot_be_written_are_one_sentence(tmp_path, hashers, monkeypatch):
    make(tmp_path / "i", hashers[0])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(IndexFolderError) as error:
        Collection.open(tmp_path / "i")
    assert "TMPDIR" in str(error.value) and error.value.field == "--index"


def test_photos_that_were_read_before_need_no_file(tmp_path, hashers, monkeypatch):
    monkeypatch.setattr(collection_lib, "KEPT", 5)
    make(tmp_path / "i", hashers[0])
    collection = Collection.open(tmp_path / "i")
    expected = [photo._replace(thumbnail=b"") for photo in collection.photos(range(COUNT))]
    for start in range(0, COUNT, 3):  # more than are kept
        numbers = [start + 2, start, start]
        assert collection.photos(numbers, thumbnails=False) == [expected[number] for number in numbers]
    shutil.rmtree(tmp_path / "i")
    assert collection.photos(numbers, thumbnails=False) == [expected[number] for number in numbers]
    for request in ({"numbers": numbers}, {"numbers": range(COUNT), "thumbnails": False}):
        with pytest.raises(IndexFolderError):
            collection.photos(**request)


def test_an_index_by_another_encoder_cannot_take_its_place(tmp_path, hashers):
    make(tmp_path / "i", hashers[0])
    collection = Collection.open(tmp_path / "i")
    (tmp_path / "i").rename(tmp_path / "old")
    make(tmp_path / "i", hashers[1])
    with pytest.raises(IndexFolderError) as refused:
        collection.renewed()
    assert refused.value.field == "--index"


def test_an_empty_collection_finds_nothing(tmp_path, hashers):
    make(tmp_path / "i", hashers[0], rows=[])
    collection = Collection.open(tmp_path / "i")
    codes = np.zeros((2, 1), np.uint8)
    assert collection.nearest(codes, 3) == collection.within(codes, 3) == [[], []] and collection.groups(1) == []
    assert collection.reranked(np.zeros((2, 8), np.float32), [[], []]) == [[], []]


def test_an_encoder_of_longer_codes_than_those_of_the_index_is_rejected(tmp_path, hashers):
    metadata = IndexMetadata("/photos", collection_lib.encoder_identity(hashers[0]) | {"bits": 16})
    PhotoTable.create(str(tmp_path / "i"), metadata, collection_lib.hasher_bytes(hashers[0]))
    with pytest.raises(IndexFolderError) as error:
        Collection.open(tmp_path / "i")
    assert error.value.field == "--index"


def test_a_damaged_encoder_is_that_of_the_index(tmp_path, hashers):
    content = bytearray(collection_lib.hasher_bytes(hashers[0]))
    content[-1] ^= 1
    PhotoTable.create(str(tmp_path / "i"), IndexMetadata("/", {"bits": 8, "side": 16}), bytes(content))
    with pytest.raises(SavedHasherError, match="damaged") as error:
        Collection.open(tmp_path / "i")
    assert error.value.field == "--index"
    assert str(tmp_path / "i") in str(error.value) and "hasher.safetensors" not in str(error.value)


def test_the_encoder_comes_back_as_it_was(tmp_path, hashers):
    loaded = collection_lib.load_hasher(make(tmp_path / "i", hashers[0]))
    assert collection_lib.encoder_identity(loaded) == collection_lib.encoder_identity(hashers[0])
    assert collection_lib.encoder_identity(loaded) != collection_lib.encoder_identity(hashers[1])
    images = RNG.integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(loaded.encode(images), hashers[0].encode(images))
