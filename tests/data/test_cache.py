"""Disk caches: read as written, never stale, never half-written, pruned by use, locked, and damage detected."""

import contextlib
import os
import threading

import numpy as np
import pytest

from cib_jax.data import cache
from cib_jax.data.cache import DamagedError, FeatureCache, digest_of_images
from tests.data import errors

MADE_OF = {"backbone": "vgg16", "size": 224}
FEATURES = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float16)


def written(root, made_of=MADE_OF):
    features = FeatureCache(root, made_of)
    features.write("view-0", FEATURES)
    return features


def test_a_part_is_read_as_it_was_written_by_whoever_asks_for_the_same(tmp_path):
    written(tmp_path)
    again = FeatureCache(tmp_path, dict(reversed(MADE_OF.items())))
    read = again.read("view-0", (5, 7), np.float16)
    assert read.dtype == np.float16
    assert np.array_equal(read, FEATURES)
    assert again.read("view-1", (5, 7), np.float16) is None


@pytest.mark.parametrize("other", [MADE_OF | {"size": 96}, {"backbone": "vgg16"}, MADE_OF | {"new": 1}])
def test_what_was_made_of_something_else_is_not_read(tmp_path, other):
    written(tmp_path)
    assert FeatureCache(tmp_path, other).read("view-0", (5, 7), np.float16) is None


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [flipped, lambda old: old[:-3], lambda old: b"", lambda old: b"x" * 99])
def test_a_damaged_part_is_refused_and_can_be_written_again(tmp_path, damage):
    features = written(tmp_path)
    path = features.folder / "view-0.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedError, match=r"view-0\.safetensors"):
        features.read("view-0", (5, 7), np.float16)
    features.write("view-0", FEATURES)
    assert np.array_equal(features.read("view-0", (5, 7), np.float16), FEATURES)


@pytest.mark.parametrize(("shape", "dtype"), [((5, 8), np.float16), ((5, 7), np.float32)])
def test_a_part_of_another_shape_or_type_is_refused(tmp_path, shape, dtype):
    with pytest.raises(DamagedError):
        written(tmp_path).read("view-0", shape, dtype)


def test_nothing_half_written_stays_behind(tmp_path):
    features = written(tmp_path)
    (features.folder / "view-1.safetensors").mkdir()  # so that replacing it fails
    with pytest.raises(OSError):
        features.write("view-1", FEATURES)
    names = ["made_of.json", "view-0.safetensors", "view-1.safetensors"]
    assert sorted(file.name for file in features.folder.iterdir()) == names


def test_a_folder_that_cannot_be_made_is_an_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        FeatureCache(tmp_path / "file", MADE_OF).write("view-0", FEATURES)


def test_pruning_takes_what_was_not_used_for_longest_and_never_its_own(tmp_path):
    caches = [written(tmp_path, MADE_OF | {"number": number}) for number in range(4)]
    for age, used in enumerate(caches):
        os.utime(used.folder, (1000 - age, 1000 - age))
    (tmp_path / "not ours").mkdir()
    caches[3].read("view-0", (5, 7), np.float16)  # the oldest, and now the newest
    one = sum(file.stat().st_size for file in caches[0].folder.iterdir())
    caches[2].prune(2 * one + one // 2)
    assert [used.folder.exists() for used in caches] == [False, False, True, True]
    caches[2].prune(0)
    assert [used.folder.exists() for used in caches] == [False, False, True, False]
    assert (tmp_path / "not ours").exists()


def test_the_digest_sees_pixels_order_and_size_but_not_how_images_are_cut_into_batches():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 2, 3), dtype=np.uint8)
    digest = digest_of_images([images])
    assert digest == digest_of_images([images[:1], images[1:5], images[5:]])
    changed = images.copy()
    changed[3, 0, 0, 0] ^= 1
    others = [[changed], [images[::-1]], [images[:5]], [images.reshape(6, 2, 4, 3)]]
    assert len({digest, *map(digest_of_images, others)}) == 5


def test_a_cache_that_may_only_be_read_is_read(tmp_path, monkeypatch):
    features = written(tmp_path)

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "utime", denied)
    assert np.array_equal(features.read("view-0", (5, 7), np.float16), FEATURES)


def test_one_writer_waits_for_another_and_says_so(tmp_path):
    shown, done = [], threading.Event()

    @contextlib.contextmanager
    def bar(description, total):
        shown.append((description, total))
        done.set()
        yield shown.append

    def wait():
        with cache.exclusive(tmp_path, bar):
            shown.append("second")

    second = threading.Thread(target=wait)
    with cache.exclusive(tmp_path):
        second.start()
        assert done.wait(30)
        shown.append("first")
    second.join()
    assert [shown[0][1], *shown[1:]] == [1, "first", 1, "second"]


def test_a_folder_is_in_use_as_long_as_a_reader_is_open(tmp_path):
    with cache.shared(tmp_path):
        with cache.shared(tmp_path):
            assert cache.in_use(tmp_path)
        assert cache.in_use(tmp_path)
    assert not cache.in_use(tmp_path)
    with cache.exclusive(tmp_path):  # writers are no readers
        assert not cache.in_use(tmp_path)


def test_parts_that_another_process_computes_come_last(tmp_path):
    features, names = FeatureCache(tmp_path, MADE_OF), ["a", "b", "c"]
    others = FeatureCache(tmp_path, MADE_OF).in_turn(names)
    assert next(others) == "a"
    own = features.in_turn(names)
    assert [next(own), next(own)] == ["b", "c"]
    got = []
    last = threading.Thread(target=lambda: got.extend(own))
    last.start()  # releases "c" and waits for "a"
    assert sorted(others) == ["b", "c"]
    last.join(30)
    assert got == ["a"]


def test_features_are_computed_without_a_lock_if_there_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    assert [*FeatureCache(tmp_path / "file", MADE_OF).in_turn("ab")] == ["a", "b"]


def test_errors_name_the_field_of_the_cache(tmp_path):
    with errors.raises("config.cache.dir", tmp_path, "no space left"), cache.write_errors(tmp_path, "photos"):
        raise OSError(28, "No space left on device")
    with errors.raises("config.cache.dir", tmp_path, "1048576.0 GiB"):
        cache.validate_free_space(tmp_path, 2**50, "photos", "lower something")


def test_pruning_passes_over_what_another_process_deletes(tmp_path, monkeypatch):
    caches = [written(tmp_path, MADE_OF | {"number": number}) for number in range(2)]
    real = type(tmp_path).stat

    def gone(path, **named):
        if path == caches[0].folder:
            raise FileNotFoundError(2, "No such file", str(path))
        return real(path, **named)

    monkeypatch.setattr(type(tmp_path), "stat", gone)
    caches[1].prune(0)
    assert caches[1].folder.exists()


def test_the_oldest_files_are_removed_until_the_rest_fits(tmp_path):
    for number in (3, 1, 4, 2):
        (tmp_path / str(number)).write_bytes(bytes(10))
        os.utime(tmp_path / str(number), (number, number))
    (tmp_path / "gone").symlink_to("nowhere")
    cache.remove_oldest_files(tmp_path, 40)
    assert len(list(tmp_path.iterdir())) == 5
    cache.remove_oldest_files(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "gone"]
