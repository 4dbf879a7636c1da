"""Table of an index: round trips of rows, several writers, and places in every state."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import lancedb
import numpy as np
import pytest

from cib_jax.errors import IndexFolderError
from cib_jax.files import install_command
from cib_jax.storage import photo_table
from cib_jax.storage.photo_table import IndexMetadata, PhotoTable, Row, key_of

COLUMNS = ["path", "raw_path", "size", "modified", "width", "height", "thumbnail"]


def metadata(bits=16, images="/photos"):
    return IndexMetadata(images, {"bits": bits, "side": 16, "weights": "none"}, {"epochs": 3})


def made(uri, bits=16):
    return PhotoTable.create(str(uri), metadata(bits), b"the encoder")


def row(number, bits=16, by=0):
    """A photo with values that identify its number and its writer."""
    code = np.random.default_rng([number, by]).bytes(bits // 8)
    return Row(f"{number:03}.jpg", number, 1_600_000_000_123_456_789 + by, code, 1 + by, 2, b"jpeg %d" % by)


def content(table):
    """All that a table holds: readable photos by path as Row, and unreadable ones as (path, reason)."""
    snapshot = table.snapshot()
    rows = table.read(snapshot, range(len(snapshot.keys)), COLUMNS)
    found = {}
    for number, one in rows.items():
        path = one["path"] if one["raw_path"] is None else os.fsdecode(one["raw_path"])
        values = (one["size"], one["modified"], snapshot.codes[number].tobytes())
        assert path not in found and snapshot.keys[number] == key_of(path)
        found[path] = Row(path, *values, one["width"], one["height"], one["thumbnail"])
    return found, table.unreadable()


def refuse(value, function, *arguments):
    with pytest.raises(IndexFolderError, match=re.escape(value)) as refused:
        function(*arguments)
    assert refused.value.field == "--index" and "\n" not in str(refused.value)


@pytest.mark.parametrize("bits", [8, 64, 96])
def test_rows_come_back_as_they_were_put(tmp_path, bits):
    table = made(tmp_path / "i", bits)
    rows = [row(number, bits) for number in range(20)]
    rows += [
        Row("schön/ß 👍.jpg", 1 << 40, 0, b"\0" * (bits // 8), 1, 9),
        Row(os.fsdecode(b"caf\xe9.jpg"), 5, -1_500_000_000, b"\xff" * (bits // 8), 20_000, 1, b"\xff\xd8"),
        Row('it\'s "x" \\ % \n.jpg', 1, (1 << 62) + 1, b"\1" * (bits // 8)),
    ]
    table.put([*rows, Row("broken.jpg", 3, 4, reason="truncated"), Row(os.fsdecode(b"\xe9"), 0, 4, reason="0 bytes")])
    table.put([])
    again = PhotoTable.open(str(tmp_path / "i"))
    found, unreadable = content(again)
    assert found == {one.path: one for one in rows}
    assert unreadable == [("broken.jpg", "truncated"), (os.fsdecode(b"\xe9"), "0 bytes")]
    assert len(again) == len(rows) + 2 and again.metadata == metadata(bits) and again.encoder() == b"the encoder"
    state = again.state()
    assert np.array_equal(state.keys, np.sort(state.keys))
    known = zip(state.keys.tolist(), state.sizes.tolist(), state.modified_ns.tolist(), strict=True)
    expected = [(key_of(one.path), one.size, one.modified_ns) for one in rows]
    assert set(known) == {*expected, (key_of("broken.jpg"), 3, 4), (key_of("\udce9"), 0, 4)}


def test_a_photo_put_again_replaces_what_was_known_of_it_and_a_removed_one_is_gone(tmp_path):
    table = made(tmp_path / "i")
    table.put([row(number) for number in range(6)])
    table.put([row(2, by=7), Row("003.jpg", 3, 3, reason="damaged"), row(9)])
    table.remove([key_of("000.jpg"), key_of("never there.jpg")])
    table.remove([])
    found, unreadable = content(table)
    assert found == {f"{n:03}.jpg": row(n, by=by) for n, by in [(1, 0), (2, 7), (4, 0), (5, 0), (9, 0)]}
    assert unreadable == [("003.jpg", "damaged")]
    table.put([row(3)])
    assert content(table)[1] == []
    paths = ["001.jpg", "009.jpg"]
    assert sorted(table.paths(key_of(path) for path in [*paths, "000.jpg"])) == paths and table.paths([]) == []


def test_many_keys_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_table, "AT_ONCE", 7)
    table = made(tmp_path / "i")
    table.put([row(number) for number in range(40)])
    names = [f"{number:03}.jpg" for number in range(1, 40, 2)]
    assert sorted(table.paths(map(key_of, names))) == names


def test_a_snapshot_stays_as_it_was(tmp_path):
    table = made(tmp_path / "i")
    table.put([row(number) for number in range(10)])
    before, version = table.snapshot(), table.version
    table.put([row(number, by=1) for number in range(5, 15)])
    table.remove([key_of("000.jpg")])
    table.compact()
    order = sorted(range(10), key=lambda number: key_of(f"{number:03}.jpg"))
    read = table.read(before, [3, 0, 3, 9], ["path", "modified"])
    assert read == {at: {"path": f"{order[at]:03}.jpg", "modified": row(0).modified_ns} for at in (0, 3, 9)}
    # Nothing else: a time becomes a Python object only where Pandas is installed.
    assert [one.keys() for one in table.read(before, [3], ["feature"]).values()] == [{"feature"}]
    assert table.version > version
    assert len(table.snapshot().keys) == 14 and len(before.keys) == 10


def test_an_empty_index_has_a_snapshot_of_nothing(tmp_path):
    table = made(tmp_path / "i", 64)
    snapshot = table.snapshot()
    assert snapshot.codes.shape == (0, 8) and len(table.state().keys) == 0 and table.read(snapshot, [], COLUMNS) == {}


def test_threads_that_put_the_same_and_other_photos_leave_each_once_with_the_values_of_one(tmp_path):
    uri = tmp_path / "i"
    made(uri)
    tables, together = [PhotoTable.open(str(uri)) for _ in range(4)], threading.Barrier(4)
    errors = []

    def write(by):
        try:
            for block in range(5):
                together.wait()
                own = [row(100 * (by + 1) + block, by=by)]
                tables[by].put([row(number, by=by) for number in range(block * 4, block * 4 + 8)] + own)
                if by == 0:
                    tables[by].remove([key_of(f"{100 * (by + 1) + block:03}.jpg")])
                if by == 1:
                    tables[by].compact()
        except BaseException as error:
            errors.append(error)
            together.abort()

    threads = [threading.Thread(target=write, args=(by,)) for by in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    table = PhotoTable.open(str(uri))
    found, _ = content(table)
    shared = {f"{number:03}.jpg" for number in range(24)}
    own = {f"{100 * (by + 1) + block:03}.jpg" for by in (1, 2, 3) for block in range(5)}
    assert set(found) == shared | own and len(table) == len(found)
    for path, one in found.items():
        number = int(path[:3])
        assert one in [row(number, by=by) for by in range(4)]


def test_threads_that_make_and_fill_an_index_at_once_come_to_one(tmp_path):
    """Processes do so in tests/end_to_end/test_index.py."""
    for attempt in range(3):
        uri, together, errors = str(tmp_path / str(attempt)), threading.Barrier(5), []

        def make(by, uri=uri, together=together, errors=errors):
            together.wait()
            try:
                table = PhotoTable.create(uri, metadata(), b"by %d" % by)
                for block in range(3):
                    table.put([row(number, by=by) for number in range(block * 5, block * 5 + 10)])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=make, args=(by,)) for by in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        table = PhotoTable.open(uri)
        found, _ = content(table)
        assert len(table) == len(found) == 20 and table.encoder() in [b"by %d" % by for by in range(5)]
        assert all(one in [row(one.size, by=by) for by in range(5)] for one in found.values())


def test_a_conflict_is_tried_again_and_raised_only_if_it_lasts(tmp_path, monkeypatch):
    table = made(tmp_path / "i")
    monkeypatch.setattr(photo_table.time, "sleep", lambda seconds: None)
    conflicts = [3]
    original = lancedb.table.LanceTable.merge_insert

    def conflicting(self, on):
        if conflicts[0]:
            conflicts[0] -= 1
            raise RuntimeError("lance error: Commit conflict for version 3: concurrent commit")
        return original(self, on)

    monkeypatch.setattr(lancedb.table.LanceTable, "merge_insert", conflicting)
    table.put([row(1)])
    assert conflicts == [0] and set(content(table)[0]) == {"001.jpg"}
    conflicts[0] = 1000
    refuse("Commit conflict", table.put, [row(2)])
    assert 1000 - conflicts[0] == 20


def test_a_place_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    refuse("is a file", PhotoTable.exists, str(tmp_path / "file"))
    (tmp_path / "folder").mkdir()
    assert not PhotoTable.exists(str(tmp_path / "folder"))
    (tmp_path / "folder" / ".DS_Store").touch()
    assert not PhotoTable.exists(str(tmp_path / "folder")) and not PhotoTable.exists(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    (tmp_path / "folder" / "letter.txt").touch()
    refuse("letter.txt", PhotoTable.exists, str(tmp_path / "folder"))
    refuse("--mode=index", PhotoTable.open, str(tmp_path / "none"))
    refuse("empty", photo_table.normalize_uri, "")


def test_places_are_absolute_but_for_uris(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        photo_table.normalize_uri("a b/ü") == str(tmp_path / "a b/ü")
        and photo_table.normalize_uri("s3://b/c") == "s3://b/c"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert photo_table.normalize_uri("~/x") == photo_table.normalize_uri(pathlib.Path("x")) == str(tmp_path / "x")


def test_an_index_of_another_version_is_refused(tmp_path):
    made(tmp_path / "i")
    other = json.dumps({"version": 99, "images": "/photos", "encoder": {"bits": 16}})
    lancedb.connect(tmp_path / "i").open_table("encoder").update(values={"about": other})
    refuse("99", PhotoTable.open, str(tmp_path / "i"))


@pytest.mark.parametrize(
    "about",
    [
        "",
        "[]",
        "{}",
        "[" * 10_000,
        '{"version": 1}',
        '{"version": 1, "images": "/photos", "encoder": {}}',
        '{"version": 1, "images": "/photos", "encoder": {"bits": "16"}}',
        '{"version": 1, "images": "/photos", "encoder": {"bits": 0}}',
        '{"version": 1, "images": 3, "encoder": {"bits": 16, "side": 9}}',
        '{"version": 1, "images": "/photos", "encoder": {"bits": 16, "side": 9}, "learnt": []}',
        '{"version": 1, "images": "/photos", "encoder": {"bits": 16, "side": 9}, "photos": "9"}',
        '{"version": 1, "images": "/photos", "encoder": {"bits": 16, "side": 9}, "exclude": [1]}',
        '{"version": 1, "images": "/photos", "encoder": {"bits": 16}}',
        '{"version": 1, "images": "/photos", "encoder": {"bits": 16, "side": "9"}}',
        '{"version": 1, "images": "/photos", "encoder": {"bits": 16, "side": 9}, "learnt": {"data.train_images": ""}}',
    ],
)
def test_malformed_metadata_are_reported_in_a_sentence(tmp_path, about):
    made(tmp_path / "i")
    lancedb.connect(tmp_path / "i").open_table("encoder").update(values={"about": about})
    refuse(str(tmp_path / "i"), PhotoTable.open, str(tmp_path / "i"))


def test_photos_that_moved_are_noted(tmp_path):
    made(tmp_path / "i").record(images="/elsewhere/list.CSV", exclude=["*.png"])
    moved = PhotoTable.open(str(tmp_path / "i"))
    assert moved.metadata == metadata(images="/elsewhere/list.CSV")._replace(exclude=("*.png",))
    assert moved.metadata.root == "/elsewhere"
    assert metadata().root == "/photos" and moved.encoder() == b"the encoder"


@pytest.mark.parametrize("left", ["encoder.lance/data/0.lance", "encoder.lance/_versions/.tmp"])
def test_what_a_killed_process_began_is_made_anew(tmp_path, left):
    """Killed while it wrote the first table, or between the two."""
    (tmp_path / "i" / left).parent.mkdir(parents=True)
    (tmp_path / "i" / left).write_bytes(b"half")
    assert not PhotoTable.exists(str(tmp_path / "i"))
    table = made(tmp_path / "i")
    shutil.rmtree(tmp_path / "i" / "photos.lance")
    assert table.encoder() == b"the encoder" and len(PhotoTable.open(str(tmp_path / "i"))) == 0


def test_an_index_that_lost_its_encoder_is_not_taken_for_a_new_one(tmp_path):
    made(tmp_path / "i").put([row(1)])
    shutil.rmtree(tmp_path / "i" / "encoder.lance" / "_versions")
    refuse("encoder.lance", PhotoTable.exists, str(tmp_path / "i"))


@pytest.mark.parametrize("which", ["encoder.lance/_versions", "photos.lance/_versions", "photos.lance/data"])
def test_a_damaged_index_is_reported_in_a_sentence(tmp_path, which):
    made(tmp_path / "i").put([row(number) for number in range(50)])
    for path in (tmp_path / "i" / which).iterdir():
        path.write_bytes(b"\0" * 37)
    refuse(f"{tmp_path / 'i'} cannot be read", lambda: PhotoTable.open(str(tmp_path / "i")).snapshot())


def flip(folder, content):
    """Flips a bit in the middle of some bytes, wherever in the files of a table these are; returns how often."""
    found = 0
    for path in (folder / "photos.lance" / "data").iterdir():
        data = bytearray(path.read_bytes())
        place = -1
        while (place := data.find(content, place + 1)) >= 0:
            data[place + len(content) // 2] ^= 4
            found += 1
        path.write_bytes(data)
    return found


def test_a_flipped_bit_in_a_code_is_noticed_and_the_photo_encoded_again(tmp_path):
    rows = [row(number, 96) for number in range(5)]
    made(tmp_path / "i", 96).put(rows)
    assert flip(tmp_path / "i", rows[3].code) == 1
    table = PhotoTable.open(str(tmp_path / "i"))
    refuse("1 photo", table.snapshot)
    state = table.state()
    assert state.keys[state.modified_ns == -1].tolist() == [key_of("003.jpg")]
    table.put([rows[3]])
    assert content(table)[0]["003.jpg"] == rows[3]


def test_a_flipped_bit_in_a_thumbnail_is_noticed(tmp_path):
    thumbnails = [np.random.default_rng(number).bytes(3000) for number in range(5)]
    made(tmp_path / "i").put([row(number)._replace(thumbnail=thumbnails[number]) for number in range(5)])
    assert flip(tmp_path / "i", thumbnails[3]) == 1
    table = PhotoTable.open(str(tmp_path / "i"))
    snapshot = table.snapshot()
    at = snapshot.keys.tolist().index(key_of("003.jpg"))
    assert table.read(snapshot, [at], ["path"])[at]["path"] == "003.jpg"
    refuse("thumbnail", table.read, snapshot, [at], ["path", "thumbnail"])
    assert len(table.read(snapshot, [at - 1], ["thumbnail"])) == 1


def put_with_features(folder):
    """Puts five photos and a file that cannot be read, with values that are found in the files of the table."""
    rows = [
        row(number)._replace(path=f"a photo {number}.jpg", size=0x1122334455 + number, feature=b"feature %d" % number)
        for number in range(5)
    ]
    made(folder).put([*rows, Row("broken.jpg", 3, 4, reason="truncated")])
    return PhotoTable.open(str(folder))


@pytest.mark.parametrize(
    ("content", "what"), [(b"a photo 3", "a path"), (b"feature 3", "a feature"), (b"broken.jpg", "a path"),
                          (b"truncated", "a reason")]
)  # fmt: skip
def test_a_flipped_bit_in_a_text_or_a_feature_is_noticed(tmp_path, content, what):
    table = put_with_features(tmp_path / "i")
    assert flip(tmp_path / "i", content)
    snapshot = table.snapshot()
    every = range(len(snapshot.keys))
    if b"3" in content:
        at = snapshot.keys.tolist().index(key_of("a photo 3.jpg"))
        columns = ["path", "feature"]
        refuse(what, table.read, snapshot, every, columns)
        assert len(table.read(snapshot, [number for number in every if number != at], columns)) == 4
        refuse(what, table.rows, ["key", "path", "raw_path", "feature"])
    else:
        assert len(table.read(snapshot, every, ["path", "feature"])) == 5
        refuse(what, table.unreadable)


def test_a_flipped_bit_in_a_size_is_noticed_and_the_photo_read_again(tmp_path):
    table = put_with_features(tmp_path / "i")
    assert flip(tmp_path / "i", (0x1122334455 + 3).to_bytes(8, "little"))
    snapshot = table.snapshot()
    refuse("a size", table.read, snapshot, range(5), ["path"])
    refuse("a size", table.paths_and_times, snapshot)
    state = table.state()
    assert state.keys[state.modified_ns == -1].tolist() == [key_of("a photo 3.jpg")]


@pytest.mark.parametrize("change", [{"images": "/other"}, {"photos": 7}, {"exclude": ["x"]}])
def test_changed_metadata_are_noticed(change):
    about = json.loads(photo_table.serialize(metadata()))
    assert photo_table.parse(about) == metadata()
    with pytest.raises(ValueError, match="damaged"):
        photo_table.parse(about | change)


def test_an_index_without_checksums_is_read_and_written(tmp_path):
    table = made(tmp_path / "i")
    table.put([row(1), Row("broken.jpg", 3, 4, reason="truncated")])
    lancedb.connect(tmp_path / "i").open_table("photos").drop_columns(["check", "feature", "check_rest"])
    table = PhotoTable.open(str(tmp_path / "i"))
    table.put([row(2)])
    assert content(table)[0] == {f"00{number}.jpg": row(number) for number in (1, 2)}
    assert sorted(table.state().sizes.tolist()) == [1, 2, 3]


def test_without_lancedb_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    refuse(install_command("search"), made, tmp_path / "i")


def test_a_hosted_index_without_a_key_is_reported_in_a_sentence(monkeypatch):
    monkeypatch.delenv("LANCEDB_API_KEY", raising=False)
    refuse("db://photos cannot be reached", PhotoTable.exists, "db://photos")


def test_a_folder_that_may_not_be_read_is_reported_in_a_sentence(tmp_path, monkeypatch):
    """Simulated: root may read everything."""

    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "i").mkdir()
    monkeypatch.setattr(pathlib.Path, "iterdir", forbidden)
    refuse("Permission denied", PhotoTable.exists, str(tmp_path / "i"))


@contextlib.contextmanager
def mounted(folder, options):
    """A small disk, for root on machines that mount."""
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can make a small disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def test_a_full_disk_is_reported_in_a_sentence_and_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=2m"):
        table = made(disk / "i")
        table.put([row(1)])
        with (disk / "filling").open("wb", buffering=0) as filling, contextlib.suppress(OSError):
            while True:
                filling.write(b"\1" * 4096)
        large = Row("large.jpg", 1, 1, b"ab", 1, 1, b"x" * 100_000)
        refuse("the disk is full", table.put, [large])
        assert set(content(PhotoTable.open(str(disk / "i")))[0]) == {"001.jpg"}
        (disk / "filling").unlink()
        table.put([large])
        assert set(content(table)[0]) == {"001.jpg", "large.jpg"}


def test_a_read_only_index_can_be_read_but_not_written(tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=4m"):
        made(disk / "i").put([row(1)])
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        table = PhotoTable.open(str(disk / "i"))
        assert set(content(table)[0]) == {"001.jpg"}
        with pytest.raises(IndexFolderError, match=r"cannot be written \(.*[Rr]ead-only file system"):
            table.put([row(2)])
        with pytest.raises(IndexFolderError, match=r"cannot be (reached|written) \(.*[Rr]ead-only file system"):
            made(disk / "another")
