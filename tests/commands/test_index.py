"""Indexing: in step with the folder whatever happened to it, however often and wherever it was interrupted."""

import collections
import csv
import errno
import importlib.util
import os
import shutil
import sys
import threading

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import cib_jax
from cib_jax.augment.features import Standard
from cib_jax.commands import index
from cib_jax.commands.index import Indexed
from cib_jax.data import photo_folder, photos
from cib_jax.data.dataset import Unreadable
from cib_jax.errors import ConfigError, DataError, IndexFolderError
from cib_jax.inference.hasher import Hasher
from cib_jax.storage import collection, photo_table
from cib_jax.storage.photo_table import PhotoTable
from configs import features as features_config
from tests.commands import indexing
from tests.commands.indexing import expected, held, run
from tests.data import pictures


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    place = tmp_path_factory.mktemp("encoder")
    indexing.save_hasher(place)
    return place


@pytest.fixture(scope="module")
def hasher(encoder):
    return Hasher.load(encoder)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "BLOCK", 7)
    indexing.fill(tmp_path / "photos", 24)
    return tmp_path / "photos"


@pytest.fixture
def looked(monkeypatch):
    """Counts how often each photo is decoded."""
    counted, original = collections.Counter(), photos.decode_with_thumbnail

    def see(path, size, **options):
        counted[os.path.basename(path)] += 1
        return original(path, size, **options)

    monkeypatch.setattr(photos, "decode_with_thumbnail", see)
    return counted


def test_the_index_holds_the_codes_of_every_photo_and_a_second_run_does_nothing(
    tmp_path, root, encoder, hasher, looked
):
    (root / "a" / "empty.jpg").touch()
    (root / "a" / "text.png").write_bytes(b"no picture")
    (root / "notes.txt").touch()
    with open(os.path.join(os.fsencode(root), b"caf\xe9.png"), "wb") as file:
        file.write(pictures.content(pictures.smooth(33, 44, seed=77)))
    done, told = run(tmp_path / "i", root, workdir=encoder)
    assert done == Indexed(25, 27, 0, 0, 2)
    assert held(tmp_path / "i") == expected(root, hasher)
    assert set(looked.values()) == {1} and len(looked) == 27
    assert "left out: 1 .txt" in told and "Cannot be read: a/empty.jpg: 0 bytes" in told
    assert f"25 photos in {tmp_path / 'i'}: 27 files new, 0 changed, 0 gone, 2 unreadable" in told
    with (tmp_path / "i" / "unreadable.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[:2] == [["path", "reason"], ["a/empty.jpg", "0 bytes"]] and rows[2][0] == "a/text.png"
    version = PhotoTable.open(str(tmp_path / "i")).version
    for options in ({}, {"images": root}, {"images": root, "workdir": encoder}):
        done, _ = run(tmp_path / "i", **options)
        assert done == Indexed(25, 0, 0, 0, 2)
    assert sum(looked.values()) == 27 and PhotoTable.open(str(tmp_path / "i")).version == version


def test_what_came_changed_or_went_is_redone_alone(tmp_path, root, encoder, hasher, looked):
    (root / "a" / "broken.jpg").write_bytes(b"no picture")
    run(tmp_path / "i", root, workdir=encoder)
    looked.clear()
    pictures.write(root / "new" / "new.jpg", pictures.smooth(50, 50, seed=99))
    pictures.write(root / "a" / "00.jpg", pictures.smooth(80, 70, seed=98))
    os.utime(root / "b" / "01.png", ns=(1, 1))
    (root / "c" / "02.webp").unlink()
    (root / "a" / "03.jpg").rename(root / "a" / "renamed.jpg")
    (root / "b" / "04.png").write_bytes(b"broken since")
    pictures.write(root / "a" / "broken.jpg", pictures.smooth(44, 33, seed=97))
    done, told = run(tmp_path / "i")
    assert held(tmp_path / "i") == expected(root, hasher)
    assert set(looked) == {"new.jpg", "00.jpg", "01.png", "renamed.jpg", "04.png", "broken.jpg"}
    assert set(looked.values()) == {1} and done == Indexed(24, 2, 4, 2, 1)
    assert "2 files new, 4 changed, 2 gone, 1 unreadable" in told
    assert "b/04.png" in (tmp_path / "i" / "unreadable.csv").read_text()
    pictures.write(root / "b" / "04.png", pictures.smooth(44, 33, seed=96))
    run(tmp_path / "i")
    assert not (tmp_path / "i" / "unreadable.csv").exists()


def test_a_file_that_may_not_be_read_is_tried_again_though_it_stays_as_it_is(tmp_path, root, encoder, hasher, looked):
    original = photos._opened

    def forbidden(content):
        if str(content).endswith("05.webp"):
            raise PermissionError(13, "Permission denied")
        return original(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "_opened", forbidden)
        done, told = run(tmp_path / "i", root, workdir=encoder)
        assert done == Indexed(23, 24, 0, 0, 1) and "Cannot be read: c/05.webp: permission denied" in told
        done, _ = run(tmp_path / "i")
        assert done == Indexed(23, 0, 0, 0, 1) and looked["05.webp"] == 2 and sum(looked.values()) == 25
    done, _ = run(tmp_path / "i")
    assert done == Indexed(24, 0, 0, 0, 0) and held(tmp_path / "i") == expected(root, hasher)


def test_a_photo_too_large_is_tried_again_where_more_is_allowed(tmp_path, root, encoder, hasher):
    pictures.write(root / "large.png", pictures.smooth(1500, 1000))
    small = indexing.config(data__max_megapixels=1)
    done, told = run(tmp_path / "i", root, workdir=encoder, settings=small)
    assert done.unreadable == 1 and "1500 × 1000 pixels, more than data.max_megapixels=1" in told
    run(tmp_path / "i")
    assert held(tmp_path / "i") == expected(root, hasher)


def test_a_photo_that_vanishes_while_it_is_indexed_is_none_the_next_time(tmp_path, root, encoder, hasher, monkeypatch):
    original = PhotoTable.put

    def put(table, rows):
        original(table, rows)
        for path in root.rglob("1*.jpg"):
            path.rename(tmp_path / path.name)

    monkeypatch.setattr(index.secrets, "randbelow", lambda count: 0)
    monkeypatch.setattr("cib_jax.files.os.sched_getaffinity", lambda process: {0})
    monkeypatch.setattr(PhotoTable, "put", put)
    run(tmp_path / "i", root, workdir=encoder)
    monkeypatch.undo()
    moved = list(tmp_path.glob("1*.jpg"))
    assert moved
    for path in moved:  # back as they were, as where a folder was synchronised
        path.rename(root / "a" / path.name)
    run(tmp_path / "i")
    assert held(tmp_path / "i") == expected(root, hasher)


def test_links_that_lead_nowhere_are_told_and_not_kept(tmp_path, root, encoder, hasher):
    (root / "dangling.jpg").symlink_to(root / "nothing.jpg")
    done, told = run(tmp_path / "i", root, workdir=encoder)
    assert "Cannot be read: dangling.jpg: not there" in told
    assert held(tmp_path / "i") == expected(root, hasher) and done.unreadable == 0


def test_photos_of_a_folder_that_cannot_be_entered_are_kept(tmp_path, root, encoder, hasher, monkeypatch):
    """Simulated: root may enter everything."""
    run(tmp_path / "i", root, workdir=encoder)
    before, original = expected(root, hasher), photo_folder.walk_folder
    (root / "b" / "13.png").unlink()
    del before["b/13.png"]

    def walk(directory, exclude):
        found = original(directory, exclude)
        paths = [path for path in found.paths if path[0] != "a"]
        return found._replace(paths=paths, closed=[Unreadable("a", "permission denied")])

    monkeypatch.setattr(photo_folder, "walk_folder", walk)
    done, told = run(tmp_path / "i")
    assert done.removed == 1 and held(tmp_path / "i") == before
    assert "the first: a: permission denied" in told
    assert '"a","permission denied"' in (tmp_path / "i" / "unreadable.csv").read_text()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_listed_photos_that_cannot_be_reached_are_kept(tmp_path, root, encoder, hasher, monkeypatch, number):
    """Simulated: root may enter everything."""
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*.*"))]
    place, original = root / "list.csv", os.stat
    place.write_text("path\n" + "\n".join(names) + "\n")
    run(tmp_path / "i", place, workdir=encoder)

    def stat(path, *arguments, **options):
        if str(path).startswith(str(root / "a")):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    done, told = run(tmp_path / "i")
    monkeypatch.undo()
    assert done == Indexed(24, 0, 0, 0, 0) and held(tmp_path / "i") == expected(root, hasher)
    assert "Cannot be read: a/00.jpg: cannot be reached now" in told and "and 3 more" in told
    assert len((tmp_path / "i" / "unreadable.csv").read_text().splitlines()) == 1 + 8


def test_a_photo_that_came_and_was_indexed_by_another_process_meanwhile_is_kept(
    tmp_path, root, encoder, hasher, monkeypatch
):
    run(tmp_path / "i", root, workdir=encoder)
    original = photo_folder.walk_folder

    def walk(directory, exclude):
        found = original(directory, exclude)
        monkeypatch.setattr(photo_folder, "walk_folder", original)
        pictures.write(root / "a" / "late.jpg", pictures.smooth(40, 50, seed=96))
        run(tmp_path / "i")
        return found

    monkeypatch.setattr(photo_folder, "walk_folder", walk)
    done, _ = run(tmp_path / "i")
    assert done.removed == 0 and held(tmp_path / "i") == expected(root, hasher)
    assert "a/late.jpg" in held(tmp_path / "i")


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_a_list_of_photos(tmp_path, root, encoder, hasher, extension):
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*.*"))][::2]
    place = root / f"list.{extension}"

    def write(listed):
        if extension == "csv":
            place.write_text("path\n" + "\n".join(listed) + "\n")
        else:
            pyarrow.parquet.write_table(pyarrow.table({"path": listed}), place)

    write([*names, "c/nowhere.jpg"])
    done, told = run(tmp_path / "i", place, workdir=encoder)
    assert held(tmp_path / "i") == expected(root, hasher, names) and done == Indexed(12, 12, 0, 0, 0)
    assert "Cannot be read: c/nowhere.jpg: not there" in told
    write(names[3:])
    assert run(tmp_path / "i")[0] == Indexed(9, 0, 0, 3, 0)
    assert held(tmp_path / "i") == expected(root, hasher, names[3:])
    shutil.move(root, tmp_path / "unmounted")
    root.mkdir()
    shutil.copy(tmp_path / "unmounted" / place.name, place)
    with pytest.raises(DataError, match=r"^--images\b.*list"):
        run(tmp_path / "i")
    assert len(held(tmp_path / "i")) == 9


def test_an_emptied_folder_loses_nothing(tmp_path, root, encoder, hasher):
    run(tmp_path / "i", root, workdir=encoder)
    before = held(tmp_path / "i")
    shutil.rmtree(root)
    with pytest.raises(DataError, match=r"^--images\b"):
        run(tmp_path / "i")
    root.mkdir()
    with pytest.raises(DataError, match=r"^--images\b"):
        run(tmp_path / "i")
    assert held(tmp_path / "i") == before


def test_photos_that_moved_are_taken_up_and_others_refused(tmp_path, root, encoder, hasher, looked):
    run(tmp_path / "i", root, workdir=encoder)
    indexing.fill(tmp_path / "others", 3)
    with pytest.raises(IndexFolderError, match=r"^--images\b.*others"):
        run(tmp_path / "i", tmp_path / "others")
    root.rename(tmp_path / "moved")
    before = held(tmp_path / "i")
    for path in (tmp_path / "others").rglob("*.*"):
        path.rename(path.with_stem(f"other {path.stem}"))
    with pytest.raises(IndexFolderError, match=r"^--images\b.*others"):
        run(tmp_path / "i", tmp_path / "others")
    assert held(tmp_path / "i") == before
    looked.clear()
    done, told = run(tmp_path / "i", tmp_path / "moved")
    assert done == Indexed(24, 0, 0, 0, 0) and not looked and str(tmp_path / "moved") in told
    assert run(tmp_path / "i")[0] == done and held(tmp_path / "i") == expected(tmp_path / "moved", hasher)


def test_an_index_needs_photos_and_keeps_its_encoder(tmp_path, root, encoder):
    with pytest.raises(IndexFolderError, match=r"^--images\b"):
        run(tmp_path / "i")
    assert not (tmp_path / "i").exists()
    with pytest.raises(DataError, match=r"^--images\b"):
        run(tmp_path / "i", tmp_path / "nowhere", workdir=encoder)
    run(tmp_path / "i", root, workdir=encoder)
    indexing.save_hasher(tmp_path / "seed", seed=1)
    indexing.save_hasher(tmp_path / "bits", bits=24)
    for name, what in (("seed", "weights"), ("bits", "bits: 12 → 24")):
        with pytest.raises(IndexFolderError, match=rf"^--workdir\b.*{what}"):
            run(tmp_path / "i", root, workdir=tmp_path / name)
    with pytest.raises(ConfigError, match=r"^config\.bits\b"):
        run(tmp_path / "i", overrides={"bits": 32})
    with pytest.raises(ConfigError, match=r"^config\.bits\b"):
        run(tmp_path / "j", root, workdir=encoder, overrides={"bits": 32})
    run(tmp_path / "i", overrides={"encode_batch": 4, "devices": 1})
    # Kept inside: the folder that it came from may go.
    kept = collection.load_hasher(PhotoTable.open(str(tmp_path / "i")))
    assert collection.encoder_identity(kept) == collection.encoder_identity(Hasher.load(encoder))


def test_another_process_that_makes_it_first_with_another_encoder_is_noticed(tmp_path, root, encoder, monkeypatch):
    indexing.save_hasher(tmp_path / "other", seed=1)
    original = PhotoTable.create.__func__

    def create(cls, uri, about, file):
        other = Hasher.load(tmp_path / "other")
        original(cls, uri, about._replace(encoder=collection.encoder_identity(other)), collection.hasher_bytes(other))
        return original(cls, uri, about, file)

    monkeypatch.setattr(PhotoTable, "create", classmethod(create))
    with pytest.raises(IndexFolderError, match=r"^--workdir\b"):
        run(tmp_path / "i", root, workdir=encoder)


@pytest.mark.parametrize(("after", "kept"), [(1, False), (2, True), (4, False), (4, True)])
def test_interrupted_at_any_commit_the_same_call_comes_to_the_same(
    tmp_path, root, encoder, hasher, looked, after, kept
):
    """Before a commit, which is lost then, or right after it."""
    original, commits = PhotoTable.put, []

    def put(table, rows):
        commits.append(len(rows))
        if len(commits) < after or kept:
            original(table, rows)
        if len(commits) == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhotoTable, "put", put)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "i", root, workdir=encoder)
    there = sum(commits if kept else commits[:-1])
    assert len(held(tmp_path / "i")) == there
    looked.clear()
    run(tmp_path / "i", root, workdir=encoder)
    assert sum(looked.values()) == 24 - there and held(tmp_path / "i") == expected(root, hasher)


def test_two_at_once_share_the_work(tmp_path, root, encoder, hasher, looked):
    errors = []

    def work():
        try:
            run(tmp_path / "i", root, workdir=encoder)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and held(tmp_path / "i") == expected(root, hasher)


def test_what_another_process_did_meanwhile_is_not_done_again(tmp_path, root, encoder, hasher, looked, monkeypatch):
    """Another one indexes everything after the first commit of this one."""
    original, others = PhotoTable.put, []

    def put(table, rows):
        original(table, rows)
        if not others:
            others.append(True)
            run(tmp_path / "i", root, workdir=encoder)

    monkeypatch.setattr(PhotoTable, "put", put)
    monkeypatch.setattr(index.secrets, "randbelow", lambda count: 0)
    monkeypatch.setattr("cib_jax.files.os.sched_getaffinity", lambda process: {0})
    run(tmp_path / "i", root, workdir=encoder)
    assert held(tmp_path / "i") == expected(root, hasher)
    assert sum(looked.values()) < 24 + 14  # but for what was begun


def tiny(**fields):
    named = {"backbone": "convnet", "image_size": 8, "hidden": 8, "epochs": 1, "bits": 16, "frozen": False}
    return indexing.config(**named | {"train__views": 0} | {"data__stored_size": 20, "data__train_images": 20} | fields)


def test_without_an_encoder_one_is_learnt_the_same_each_time(tmp_path, root):
    (root / "a" / "empty.jpg").touch()
    _, told = run(tmp_path / "i", root, settings=tiny())
    run(tmp_path / "j", root, settings=tiny())
    words = " ".join(told.split())
    assert "16-bit" in words and "20 of the photos" in words
    learnt = collection.load_hasher(PhotoTable.open(str(tmp_path / "i")))
    assert learnt.side == 20 and held(tmp_path / "i") == held(tmp_path / "j") == expected(root, learnt)
    # The command that began it goes on with it; one that asks for other codes does not.
    run(tmp_path / "i", root, settings=tiny(), overrides={"bits": 16, "epochs": 1, "encode_batch": 9})
    with pytest.raises(ConfigError, match=r"^config\.bits\b.*16.*32"):
        run(tmp_path / "i", root, settings=tiny(bits=32), overrides={"bits": 32})


def test_what_cannot_be_learnt_from_is_refused(tmp_path, root):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"^--images\b"):
        run(tmp_path / "i", tmp_path / "none", settings=tiny())
    with pytest.raises(ConfigError, match=r"^config\.backbone\b"):
        run(tmp_path / "i", root, settings=features_config.get_config())
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("count", [1, 15])
def test_few_photos_get_distinct_codes_without_training(tmp_path, count):
    indexing.fill(tmp_path / "photos", count)
    done, told = run(tmp_path / "i", tmp_path / "photos", settings=tiny(bits=64, epochs=10**9))
    codes = {entry[2] for entry in held(tmp_path / "i").values()}
    assert done == Indexed(count, count, 0, 0, 0) and len(codes) == count and "--relearn" in told
    ones = [int.from_bytes(code, "big").bit_count() for code in codes]
    assert all(8 < one < 56 for one in ones)


def test_a_grown_index_learns_anew_without_loss(tmp_path, root):
    """Interrupted while it encodes, and between its two renames, it keeps the old codes and then goes on."""
    late = tmp_path / "late"
    late.mkdir()
    for path in sorted(root.rglob("*.*"))[5:]:
        path.rename(late / path.name)
    _, told = run(tmp_path / "i", root, settings=tiny())
    for path in late.iterdir():
        path.rename(root / "a" / path.name)
    _, told = run(tmp_path / "i", settings=tiny())
    before = held(tmp_path / "i")
    assert "from an index of 5 photos; --relearn" in told

    def stop(*arguments):
        raise KeyboardInterrupt

    for owner, name in ((PhotoTable, "put"), (os, "rename")):
        original, calls = getattr(owner, name), []

        def second(*arguments, original=original, calls=calls):
            calls.append(arguments)
            return stop() if len(calls) == 2 else original(*arguments)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, second)
            run(tmp_path / "i", settings=tiny(bits=24, encode_batch=5), relearn=True)
        assert held(tmp_path / ("i" if owner is PhotoTable else "i.old")) == before
    done, told = run(tmp_path / "i", settings=tiny(bits=24), relearn=True)
    learnt = collection.load_hasher(PhotoTable.open(str(tmp_path / "i")))
    assert done.photos == 24 and learnt.encoder.bits == 16, "the fields that the index was made with"
    assert held(tmp_path / "i") == expected(root, learnt) != before
    assert not list(tmp_path.glob("i.*")) and "would give better" not in run(tmp_path / "i", settings=tiny())[1]
    with pytest.raises(IndexFolderError, match=r"^--images\b.*another --index"):
        run(tmp_path / "i", late, settings=tiny(), relearn=True)
    # Fields around the network are those that it was learned with, too, unless they are given.
    for overrides, truncated in (({"data.truncated": True}, True), ({}, True), ({"data.truncated": False}, False)):
        run(
            tmp_path / "i",
            settings=tiny(data__truncated=truncated and bool(overrides)),
            overrides=overrides,
            relearn=True,
        )
        assert PhotoTable.open(str(tmp_path / "i")).metadata.learnt["data.truncated"] is truncated

    def also_by_another(uri, *arguments, **options):
        done = make(uri, *arguments, **options)
        with pytest.MonkeyPatch.context() as alone:
            alone.setattr(index, "index", make)
            run(tmp_path / "i", relearn=True, settings=tiny())
        return done

    make = index.index
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "index", also_by_another)
        run(tmp_path / "i", relearn=True, settings=tiny())
    assert held(tmp_path / "i") == expected(root, learnt) and not list(tmp_path.glob("i.*"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PhotoTable, "put", stop)
        run(tmp_path / "i", settings=tiny(bits=24), overrides={"bits": 24}, relearn=True)
    with pytest.raises(IndexFolderError, match=r"^--relearn: .*i\.new was begun .*bits: 24 → 16"):
        run(tmp_path / "i", settings=tiny(), relearn=True)
    run(tmp_path / "i", settings=tiny(bits=24), overrides={"bits": 24}, relearn=True)
    assert collection.load_hasher(PhotoTable.open(str(tmp_path / "i"))).encoder.bits == 24
    for uri in (tmp_path / "nowhere", "s3://bucket/photos"):
        with pytest.raises(IndexFolderError, match=r"^--index\b"):
            run(uri, root, settings=tiny(), relearn=True)


def test_an_encoder_of_features_is_refused(tmp_path, root):
    standard = Standard(np.zeros(6, np.float32), np.ones(6, np.float32))
    made = cib_jax.create_encoder(jax.random.key(0), backbone="none", bits=16, hidden=8, standard=standard)
    cib_jax.Hasher(*made).save(tmp_path / "features")
    with pytest.raises(IndexFolderError, match=r"^--workdir\b"):
        run(tmp_path / "i", root, workdir=tmp_path / "features")


def test_a_disk_that_fails_loses_no_photo(tmp_path, root, encoder, hasher, monkeypatch):
    """An answer of the system that is no photo's fault ends the run, and the next one goes on."""
    original = photos.decode_with_thumbnail

    def failing(path, size, **options):
        if path.endswith("20.webp"):
            raise photos.BadPhotoError("input/output error") from OSError(5, "Input/output error")
        return original(path, size, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "decode_with_thumbnail", failing)
        with pytest.raises(DataError, match=r"^--images\b"):
            run(tmp_path / "i", root, workdir=encoder)
    run(tmp_path / "i", root, workdir=encoder)
    assert held(tmp_path / "i") == expected(root, hasher)
    assert photo_table.is_local(str(tmp_path / "i"))


@pytest.mark.slow
def test_a_few_photos_are_learnt_from_by_a_pretrained_network(tmp_path):
    """As a stranger's first command does, with fewer views and epochs."""
    indexing.fill(tmp_path / "photos", 40)
    done, _ = run(tmp_path / "i", tmp_path / "photos", settings=indexing.config(epochs=2, train__views=2))
    learnt = collection.load_hasher(PhotoTable.open(str(tmp_path / "i")))
    assert done == Indexed(40, 40, 0, 0, 0) and (learnt.encoder.bits, learnt.side) == (64, 160)
    assert held(tmp_path / "i") == expected(tmp_path / "photos", learnt)


def test_without_lancedb_nothing_is_learnt_first(tmp_path, root, looked, monkeypatch):
    """Photos were read and learnt from for minutes before it was told."""
    original = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lancedb" else original(name))
    with pytest.raises(IndexFolderError, match=r"pip install .*\[search\]'"):
        run(tmp_path / "i", root)
    assert not looked and not (tmp_path / "i").exists()


def test_excluded_photos_are_not_indexed_and_the_patterns_are_kept(tmp_path, root, encoder, hasher):
    names = {str(path.relative_to(root)) for path in root.rglob("*.*")}
    kept = {name for name in names if not name.endswith(".png") and not name.startswith("c/")}
    run(tmp_path / "i", root, workdir=encoder, exclude=["*.png", "c"])
    assert held(tmp_path / "i") == expected(root, hasher, kept)
    done, _ = run(tmp_path / "i")
    assert done == Indexed(len(kept), 0, 0, 0, 0)
    run(tmp_path / "i", exclude=["*.png"])
    assert held(tmp_path / "i") == expected(root, hasher, {name for name in names if not name.endswith(".png")})
    run(tmp_path / "i", exclude=[""])
    assert held(tmp_path / "i") == expected(root, hasher)


@pytest.mark.parametrize("year", [1600, 2300])
def test_times_that_64_bits_do_not_hold_are_cut(tmp_path, root, encoder, year):
    seconds = (year - 1970) * 31_556_952
    os.utime(root / "a" / "00.jpg", (seconds, seconds))
    if (root / "a" / "00.jpg").stat().st_mtime != seconds:
        pytest.skip("this file system does not keep such a time")
    run(tmp_path / "i", root, workdir=encoder)
    assert abs(held(tmp_path / "i")["a/00.jpg"][1]) == 2**63 - 1
    assert run(tmp_path / "i")[0] == Indexed(24, 0, 0, 0, 0)


def test_a_photo_without_its_reader_is_read_once_that_is_installed(tmp_path, root, encoder, hasher, monkeypatch):
    pictures.write(root / "a" / "phone.heic", pictures.smooth(60, 40))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    done, told = run(tmp_path / "i", root, workdir=encoder)
    assert done.unreadable == 1 and "HEIC" in told and "pip install" in told
    monkeypatch.undo()
    assert run(tmp_path / "i")[0].unreadable == 0
    assert held(tmp_path / "i") == expected(root, hasher)


def test_truncated_photos_are_indexed_if_that_is_asked_for_and_told(tmp_path, root, encoder):
    whole = pictures.content(pictures.smooth(300, 200), "JPEG")
    (root / "a" / "cut.jpg").write_bytes(whole[:-500])
    assert run(tmp_path / "i", root, workdir=encoder)[0].unreadable == 1
    done, told = run(tmp_path / "i", settings=indexing.config(data__truncated=True))
    assert done.unreadable == 0 and "missing: 1, the first: a/cut.jpg" in told
