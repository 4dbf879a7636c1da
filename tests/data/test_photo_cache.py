"""Photo cache: the pixels of decoding each photo alone, kept across starts, interruptions, changes and damage."""

import contextlib
import gc
import json
import os
import shutil
import threading
import time

import numpy as np
import PIL.Image
import pytest

from cib_jax.data import photo_cache, photos
from cib_jax.data.cache import in_use
from cib_jax.data.photo_cache import PhotoCache
from cib_jax.errors import DataError
from tests.data import errors, pictures

SIZE = 12


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_cache, "SHARD", 4)
    folder = tmp_path / "photos"
    for number in range(10):
        pictures.write(folder / f"{number}.jpg", pictures.colored(number, 10))
    (folder / "5.jpg").write_bytes(b"text")
    return folder


NAMES = [f"{number}.jpg" for number in range(10)]


def prepare(root, names=NAMES, **options):
    return PhotoCache(root.parent / "cache", SIZE, **options).prepare(names, root=str(root), owner=str(root))


@pytest.fixture
def opened(monkeypatch):
    """Counts the photos that are decoded."""
    names, original = [], photos.decode

    def counted(path, size, **options):
        names.append(os.path.basename(path))
        return original(path, size, **options)

    monkeypatch.setattr(photos, "decode", counted)
    return names


def assert_right(made, root, names=NAMES):
    good = [name for name in names if name != "5.jpg"]
    assert [names[index] for index in made.kept] == good
    assert len(made.images) == len(good)
    for index, name in enumerate(good):
        assert np.array_equal(made.images[index], photos.decode(root / name, SIZE))


def test_each_photo_has_the_pixels_of_decoding_it_alone(root):
    made = prepare(root)
    assert_right(made, root)
    assert [(bad.path, bad.reason) for bad in made.unreadable] == [
        ("5.jpg", "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC image")
    ]


def test_photos_that_differ_in_pixels_alone_have_another_identity(root):
    """Of the same names, sizes and times, as frames that a camera or an archive dates alike."""
    made = []
    for number, folder in enumerate((root.parent / "a", root.parent / "b")):
        folder.mkdir()
        PIL.Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / "0.bmp")
        os.utime(folder / "0.bmp", (1, 1))
        made.append(prepare(folder, ["0.bmp"]).images.identity)
    assert made[0] != made[1]


def test_shards_are_closed_once_their_images_are_not_used(root, monkeypatch):
    made, opened, original = prepare(root), [], os.open

    def noted(path, *arguments, **options):
        opened.append(original(path, *arguments, **options))
        return opened[-1]

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", noted)
        assert_right(made, root)
    assert len(opened) == 3 and all(os.fstat(number) for number in opened)
    del made
    gc.collect()
    for number in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


def test_a_second_start_opens_no_photo_and_knows_the_set(root, opened):
    first = prepare(root)
    assert sorted(opened) == NAMES
    opened.clear()
    again = prepare(root)
    assert opened == []
    assert_right(again, root)
    assert (again.images.identity, again.unreadable) == (first.images.identity, first.unreadable)


def test_what_changed_was_added_or_went_is_all_that_is_redone(root, opened):
    first = prepare(root)
    opened.clear()
    pictures.write(root / "3.jpg", pictures.colored(4, 10, width=77))
    pictures.write(root / "new.png", pictures.colored(2, 10))
    os.utime(root / "7.jpg", ns=(1, 1))
    (root / "0.jpg").unlink()
    names = [*NAMES[1:], "new.png"]
    made = prepare(root, names)
    assert sorted(opened) == ["3.jpg", "7.jpg", "new.png"]
    opened.clear()
    assert_right(made, root, names)
    assert made.images.identity != first.images.identity


def test_shards_without_a_living_photo_go_and_a_mostly_dead_rest_is_rewritten(root):
    prepare(root)
    cache = next((root.parent / "cache").iterdir())
    assert len(list(cache.glob("*.npy"))) == 3
    names = ["0.jpg", "4.jpg", "5.jpg"]
    made = prepare(root, names)
    assert_right(made, root, names)
    assert [len(np.load(path)) for path in cache.glob("*.npy")] == [2]
    assert_right(prepare(root, names), root, names)


def test_without_room_for_a_second_copy_the_first_stays(root, monkeypatch):
    prepare(root)
    usage = shutil.disk_usage(root)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    names = ["0.jpg", "4.jpg", "5.jpg"]
    assert_right(prepare(root, names), root, names)


def test_no_shard_is_deleted_while_a_reader_uses_it(root):
    first = prepare(root)
    names = ["0.jpg"]
    second = prepare(root, names)
    assert_right(first, root)
    assert_right(second, root, names)
    cache = next((root.parent / "cache").iterdir())
    assert in_use(cache)
    del first, second
    assert not in_use(cache)
    prepare(root, names)
    assert len(list(cache.glob("*.npy"))) == 1


def test_an_interrupted_preparation_is_continued(root, opened):
    prepared = []

    @contextlib.contextmanager
    def bar(description, total):
        def advance(count):
            prepared.append(count)
            if len(prepared) == 2:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        prepare(root, bar=bar)
    opened.clear()
    made = prepare(root)
    assert sorted(opened) == ["8.jpg", "9.jpg"]
    opened.clear()
    assert_right(made, root)
    assert len(made.notes) == 1 and "8 of 10" in made.notes[0]


def test_a_damaged_shard_is_reported_and_made_again(root):
    prepare(root)
    cache = next((root.parent / "cache").iterdir())
    pixels = sorted(cache.glob("*.npy"))
    os.truncate(pixels[0], pixels[0].stat().st_size - 1)
    pixels[1].unlink()
    entries = sorted(cache.glob("0*.json"))[2]
    entries.write_text(entries.read_text()[:-5])
    made = prepare(root)
    assert_right(made, root)
    assert sum(".npy is damaged" in note for note in made.notes) == 3
    assert prepare(root).notes == []


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_flipped_bit_anywhere_is_seen_or_harmless(root, suffix):
    """Reported while photos are prepared, and the shard is made again, or when a photo is read."""
    prepare(root)
    cache = next((root.parent / "cache").iterdir())
    whole = {path: path.read_bytes() for path in cache.glob("0*")}
    path = sorted(cache.glob(f"*.{suffix}"))[0]
    places, seen = {*range(0, 80, 6), *np.linspace(0, len(whole[path]) - 1, 30).astype(int).tolist()}, 0
    for place in places:
        altered = bytearray(whole[path])
        altered[place] ^= 1 << place % 7
        path.write_bytes(altered)
        try:
            made = prepare(root)
            assert_right(made, root)
            seen += bool(made.notes)
        except DataError as error:
            assert error.field == str(path)
            seen += 1
        made = None
        for file in cache.glob("0*"):
            file.unlink()
        for file, content in whole.items():
            file.write_bytes(content)
    assert seen > len(places) / 2


def test_damaged_photos_are_not_copied_to_a_new_shard(root):
    prepare(root)
    cache = next((root.parent / "cache").iterdir())
    path = sorted(cache.glob("*.npy"))[0]
    path.write_bytes(path.read_bytes()[: -4 * SIZE * SIZE * 3] + bytes(4 * SIZE * SIZE * 3))
    with errors.raises(str(path)):
        prepare(root, ["0.jpg", "4.jpg", "5.jpg"])


def test_shards_without_checksums_are_made_again(root, opened):
    """Those of version 0.1.0."""
    prepare(root)
    cache = next((root.parent / "cache").iterdir())
    for path in cache.glob("0*.json"):
        path.write_text(json.dumps([entry[:5] for entry in json.loads(path.read_text())[1]]))
    opened.clear()
    assert_right(prepare(root), root)
    assert set(opened) >= set(NAMES)


def test_another_size_or_owner_is_kept_apart(root):
    made = prepare(root)
    other = PhotoCache(root.parent / "cache", SIZE).prepare(NAMES[:2], root=str(root), owner="list.csv")
    larger = PhotoCache(root.parent / "cache", 20).prepare(NAMES[:2], root=str(root), owner=str(root))
    assert larger.images[0].shape == (20, 20, 3)
    assert len(other.images) == 2
    assert_right(made, root)
    assert len({made.images.identity, other.images.identity, larger.images.identity}) == 3


def test_too_small_a_disk_is_refused_before_anything_is_decoded(root, opened, monkeypatch):
    usage = shutil.disk_usage(root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with errors.raises("config.cache.dir", root.parent / "cache", "0.0 GiB"):
        prepare(root)
    assert opened == []


def test_a_disk_that_fills_up_is_reported_and_nothing_is_lost(root, opened, monkeypatch):
    save, shards = np.save, []

    def full(file, array):
        if len(shards) == 1:
            raise OSError(28, "No space left on device")
        shards.append(1)
        save(file, array)

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        with errors.raises("config.cache.dir", "no space left on device"):
            prepare(root)
    opened.clear()
    prepare(root)
    assert len(opened) == 6
    assert not list((root.parent / "cache").glob("*/*.part"))


def test_a_cache_that_cannot_be_created_is_reported(root):
    (root.parent / "cache").write_text("a file")
    with errors.raises("config.cache.dir", root.parent / "cache"):
        prepare(root)


def test_names_that_are_no_valid_text_survive(root, opened):
    raw = b"caf\xe9 \xe6\x97\xa5\xe6\x9c\xac.jpg"
    shutil.copy(root / "1.jpg", os.path.join(os.fsencode(root), raw))
    names = [os.fsdecode(raw)]
    assert len(prepare(root, names).images) == 1
    opened.clear()
    assert len(prepare(root, names).images) == 1
    assert opened == []


def test_readers_in_several_threads_see_the_same(root, monkeypatch):
    monkeypatch.setattr(photo_cache, "_OPEN_SHARDS", 1)
    made = prepare(root)
    expected = [np.array(made.images[index]) for index in range(9)]
    wrong = []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, 9, 200).tolist():
            if not np.array_equal(made.images[index], expected[index]):
                wrong.append(index)

    def switch_threads(phase, info):
        time.sleep(0)

    gc.callbacks.append(switch_threads)  # as those of JAX do now and then, in the middle of a C function as well
    thresholds = gc.get_threshold()
    gc.set_threshold(10)
    try:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(switch_threads)
    assert wrong == []


def test_two_at_once_do_not_harm_each_other(root):
    """Two threads lock as two processes do, since each opens the lock file itself."""
    made = []
    threads = [threading.Thread(target=lambda: made.append(prepare(root))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2
    cache = next((root.parent / "cache").iterdir())
    entries = [entry for path in sorted(cache.glob("0*.json")) for entry in json.loads(path.read_text())[1]]
    assert [entry[0] for entry in entries] == NAMES
    assert_right(prepare(root), root)


def test_truncated_photos_are_prepared_if_that_is_asked_for_and_told_at_each_start(root, opened):
    whole = pictures.content(pictures.smooth(200, 150), "JPEG")
    (root / "7.jpg").write_bytes(whole[:-300])
    assert [bad.path for bad in prepare(root).unreadable] == ["5.jpg", "7.jpg"]
    for starts in range(2):
        made = prepare(root, truncated=True)
        assert [bad.path for bad in made.unreadable] == ["5.jpg"]
        assert len(made.notes) == 1 and "1, the first: 7.jpg" in made.notes[0], starts
        expected = photos.decode(root / "7.jpg", SIZE, on_truncated=list)
        assert np.array_equal(made.images[made.kept.tolist().index(7)], expected)
    assert opened.count("5.jpg") == 2
