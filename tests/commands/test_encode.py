"""Encoding: the hasher's codes of every readable file, however the work is cut, shared and interrupted."""

import csv
import errno
import io
import os
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import rich.console

import cib_jax as cib
from cib_jax.commands.encode import encode
from cib_jax.commands.train import train
from cib_jax.data import photos
from cib_jax.errors import CheckpointError, CodeStoreError, ConfigError, DataError
from cib_jax.storage.code_store import read_corpus
from tests import small
from tests.commands import many
from tests.data import pictures
from tests.storage.test_code_store import flip

BAD = {
    "a/empty.jpg": b"",
    "a/text.png": b"no picture",
    "z/cut.jpg": pictures.content(pictures.smooth(99, 66), "JPEG")[:900],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of 43 photos, and 3 files that are none."""
    folder = tmp_path_factory.mktemp("corpus") / "photos"
    for number in range(42):
        kind = ("jpg", "png", "webp")[number % 3]
        image = pictures.smooth(60 + number, 90 - number, seed=number)
        pictures.write(folder / "abc"[number % 3] / f"{number:02}.{kind}", image)
    strange = os.path.join(os.fsencode(folder), b"caf\xe9.png")
    with open(strange, "wb") as file:
        file.write(pictures.content(pictures.smooth(33, 44, seed=77)))
    (folder / "z").mkdir()
    (folder / "notes.txt").touch()
    for name, content in BAD.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, root):
    folder = tmp_path_factory.mktemp("run")
    fields = {"data__name": "folder", "data__dir": str(root), "data__stored_size": 20, "data__queries": 10}
    config = small.config(
        **fields, data__train_per_class=-1, data__max_bad_fraction=0.1, augment="photo", k=0, epochs=1, encode_batch=8
    )
    train(config, folder / "run", console=rich.console.Console(file=io.StringIO()))
    return folder / "run"


@pytest.fixture(scope="module")
def wanted(run, root):
    """Paths and codes as the hasher alone gives them, of squares decoded one by one."""
    names = sorted(
        os.fsdecode(os.path.relpath(os.path.join(place, name), os.fsencode(root)))
        for place, _, files in os.walk(os.fsencode(root))
        for name in files
    )
    names = [name for name in names if name not in BAD and name != "notes.txt"]
    squares = [photos.decode(os.path.join(root, name), 20) for name in names]
    return names, cib.Hasher.load(run).encode(np.stack(squares))


@pytest.fixture
def console():
    return rich.console.Console(file=io.StringIO(), width=100)


def told(console):
    return console.file.getvalue()


def check(codes, wanted):
    paths, packed = read_corpus(codes)
    assert paths == wanted[0]
    assert np.array_equal(packed, wanted[1])


def stamps(codes):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in codes.glob("part-*")}


def test_codes_are_the_hashers(run, root, wanted, tmp_path, console):
    made = encode(run, root, tmp_path / "codes", part=10, console=console)
    assert made == (5, 5, 0, 46, 3)
    assert "46 photos in 5 parts, 3 unreadable" in told(console) and "is complete" in told(console)
    assert "left out: 1 .txt" in told(console)
    check(tmp_path / "codes", wanted)
    assert "_unreadable.csv lists" in told(console)
    with (tmp_path / "codes" / "_unreadable.csv").open(newline="") as file:
        listed = [tuple(row) for row in csv.reader(file)]
    whole = pyarrow.parquet.read_table(tmp_path / "codes")  # as any other program reads the folder's parts
    times = whole.column("modified").cast("int64").to_pylist()
    table = whole.drop_columns("modified").to_pylist()
    reasons = {row["path"]: row["reason"] for row in table if row["code"] is None}
    assert reasons.keys() == BAD.keys()
    assert listed == [("path", "reason"), *reasons.items()]
    assert (reasons["a/empty.jpg"], reasons["z/cut.jpg"][:9]) == ("0 bytes", "truncated")
    for row, modified in zip(table, times, strict=True):
        found = os.stat(os.path.join(root, row["path"] if row["raw_path"] is None else os.fsdecode(row["raw_path"])))
        assert row["size"] == found.st_size and modified == found.st_mtime_ns


@pytest.mark.parametrize(("part", "processes"), [(1, 3), (7, 2), (10, 9), (8192, 1)])
def test_however_the_work_is_cut_and_shared_the_codes_are_the_same(run, root, wanted, tmp_path, part, processes):
    counts = []
    for process in reversed(range(processes)):
        console = rich.console.Console(file=io.StringIO())
        share = {"part": part, "process": process, "processes": processes}
        counts.append(encode(run, root, tmp_path, **share, console=console))
        assert ("is complete" in told(console)) == (counts[-1].missing == 0)
        missing = f"; {counts[-1].missing} of {counts[-1].parts} part"
        assert (missing in told(console)) == (counts[-1].missing > 0)
    assert sum(one.made for one in counts) == counts[-1].parts == -(-46 // part)
    assert counts[-1].missing == 0
    check(tmp_path, wanted)


def test_photos_are_left_out_by_patterns_and_truncated_ones_are_encoded_on_request(
    run, root, wanted, tmp_path, console
):
    done = encode(run, root, tmp_path / "a", exclude=["*.jpg", "b"], console=console)
    paths, _ = read_corpus(tmp_path / "a")
    assert paths == [name for name in wanted[0] if not name.endswith(".jpg") and not name.startswith("b/")]
    assert done.unreadable == 1  # a/text.png
    overrides = {"data.truncated": True}
    assert encode(run, root, tmp_path / "b", overrides=overrides, console=console).unreadable == 2
    paths, _ = read_corpus(tmp_path / "b")
    assert set(paths) - set(wanted[0]) == {"z/cut.jpg"} and "the first: z/cut.jpg" in console.file.getvalue()


def test_parts_that_are_there_are_not_made_again_and_damaged_ones_are(run, root, wanted, tmp_path, console):
    encode(run, root, tmp_path, part=10, console=console)
    before = stamps(tmp_path)
    assert encode(run, root, tmp_path, part=10, console=console).made == 0
    assert stamps(tmp_path) == before
    (tmp_path / "part-00000001.parquet").unlink()
    cut, flipped = (tmp_path / f"part-0000000{number}.parquet" for number in (2, 4))
    cut.write_bytes(cut.read_bytes()[:-100])
    flip(flipped)
    assert encode(run, root, tmp_path, part=10, console=console).made == 3
    assert all(f"{path} is damaged (" in told(console) for path in (cut, flipped))
    after = stamps(tmp_path)
    assert {name for name in after if after[name] == before[name]} == {f"part-0000000{n}.parquet" for n in (0, 3)}
    check(tmp_path, wanted)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_photos_of_a_list_are_encoded_in_the_order_of_their_paths(run, root, wanted, tmp_path, kind, console):
    names = [name for name in wanted[0] if name.isascii() and name.startswith("b/")]
    paths = [str(root / name) for name in [*reversed(names), "b/nothing.jpg"]]
    path = tmp_path / f"list.{kind}"
    if kind == "csv":
        path.write_text("\n".join(["path,other", *(f"{name},1" for name in paths)]) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"path": paths}), path)
    made = encode(run, path, tmp_path / "codes", part=4, console=console)
    assert (made.files, made.unreadable) == (15, 1)
    of = dict(zip(wanted[0], wanted[1], strict=True))
    check(tmp_path / "codes", ([str(root / name) for name in names], np.stack([of[name] for name in names])))


def test_when_files_came_and_went_the_list_as_it_was_can_be_finished(run, root, wanted, tmp_path, console):
    moved = tmp_path / "photos"
    shutil.copytree(root, moved)
    encode(run, moved, tmp_path / "codes", part=10, process=1, processes=2, console=console)
    pictures.write(moved / "a" / "new.png", pictures.smooth(9, 9))
    (moved / wanted[0][0]).unlink()
    with pytest.raises(CodeStoreError, match=r"1 \w+ \(the first: a/new.png\) and 1 \w+ \(the first: .*--images"):
        encode(run, moved, tmp_path / "codes", part=10, console=console)
    made = encode(run, None, tmp_path / "codes", part=10, console=console)
    assert (made.made, made.files, made.unreadable) == (3, 46, 4)
    check(tmp_path / "codes", (wanted[0][1:], wanted[1][1:]))


def test_vectors_are_encoded_by_a_run_on_vectors(tmp_path, console):
    config = many.config(tmp_path, encode_batch=50, data__labelled=False)
    results = train(config, tmp_path / "run", console=console)
    # Without labels, they are measured by the nearest vectors that the codes find.
    assert 0.1 < results["metrics"]["neighbor_recall"]["10"] < results["metrics"]["neighbor_recall"]["100"] < 1
    assert " training items," in told(console) and "images" not in told(console)
    features = np.load(tmp_path / "features.npy")
    features[17, 3] = np.nan
    np.save(tmp_path / "new.npy", features)
    made = encode(tmp_path / "run", tmp_path / "new.npy", tmp_path / "codes", part=100, console=console)
    assert made == (3, 3, 0, 240, 1)
    assert "240 vectors in 3 parts, 1 unreadable" in told(console)
    good = np.delete(np.arange(240), 17)
    check(tmp_path / "codes", ([str(row) for row in good], cib.Hasher.load(tmp_path / "run").encode(features[good])))
    for images, message in (
        (tmp_path, r"^--images\b"),
        (None, r"^--images\b.*\.npy"),
        (tmp_path / "narrow.npy", r"^--images\b.*24.*5"),
        (tmp_path / "new.csv", r"\.npy or \.safetensors"),
    ):
        np.save(tmp_path / "narrow.npy", np.zeros((9, 5), np.float32))
        (tmp_path / "new.csv").touch()
        with pytest.raises((DataError, CodeStoreError), match=message):
            encode(tmp_path / "run", images, tmp_path / "others", console=console)
    assert not (tmp_path / "others").exists()


@pytest.fixture(scope="module")
def other(tmp_path_factory, few_digits):
    """A run on images of one size."""
    folder = tmp_path_factory.mktemp("other")
    train(small.config(epochs=1, **small.FEW_DIGITS), folder / "run", console=rich.console.Console(quiet=True))
    return folder / "run"


def test_a_run_on_images_of_one_size_takes_photos_at_the_side_of_its_network(root, other, wanted, tmp_path, console):
    encode(other, root, tmp_path / "codes", console=console)
    hasher = cib.Hasher.load(other)
    side = hasher.encoder.image_size
    squares = np.stack([photos.decode(os.path.join(root, name), side) for name in wanted[0]])
    check(tmp_path / "codes", (wanted[0], hasher.encode(squares)))


def test_fields_that_change_the_run_are_refused_and_others_are_not(run, root, wanted, tmp_path, console):
    encode(run, root, tmp_path / "codes", overrides={"encode_batch": 16}, console=console)
    check(tmp_path / "codes", wanted)
    # Some of several devices, and checkpoints that were moved.
    moved = {"devices": 1, "train.checkpoint_dir": str(tmp_path / "moved")}
    with pytest.raises(CheckpointError, match="moved"):
        encode(run, root, tmp_path / "codes", overrides=moved, console=console)
    shutil.copytree(run / "checkpoints", tmp_path / "moved")
    encode(run, root, tmp_path / "others", overrides=moved, console=console)
    check(tmp_path / "others", wanted)
    with pytest.raises(CodeStoreError, match=r"^--exclude\b.*\*\.jpg"):
        encode(run, None, tmp_path / "codes", exclude=["*.jpg"], console=console)
    with pytest.raises(ConfigError, match=r"^config\.bits\b.*32.*16"):
        encode(run, root, tmp_path / "codes", overrides={"bits": 32}, console=console)


def test_codes_of_another_run_are_refused(run, root, other, tmp_path, console):
    encode(run, root, tmp_path / "codes", part=20, console=console)
    with pytest.raises(CodeStoreError, match=r"parameters: .*--workdir"):
        encode(other, root, tmp_path / "codes", part=20, console=console)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("", r"^--images\b"),
        ("nowhere", r"^--images\b.*nowhere"),
        ("text", r"^--images\b.*1 \.txt"),
        ("x.npy", r"^--images\b.*\.csv or \.parquet"),
        ("x.csv", r"^--images\b.*'path'"),
        (None, r"^--images\b"),
    ],
)
def test_what_cannot_be_encoded_is_refused_before_anything_is_written(run, tmp_path, images, message, console):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "x.txt").touch()
    (tmp_path / "x.npy").touch()
    (tmp_path / "x.csv").write_text("name\n1\n")
    with pytest.raises((DataError, CodeStoreError), match=message):
        encode(run, str(tmp_path / images) if images else images, tmp_path / "codes", console=console)
    with pytest.raises(CodeStoreError, match=r"^--part\b.*0"):
        encode(run, tmp_path, tmp_path / "codes", part=0, console=console)
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE])
def test_what_is_no_photos_fault_ends_the_work_and_no_part_takes_it_for_one(
    run, root, wanted, tmp_path, number, monkeypatch, console
):
    """As where files lie on another machine that is away for a while."""
    decode = photos.decode

    def away(path, size, **options):
        if path.endswith("b/25.png"):
            try:
                raise OSError(number, os.strerror(number))
            except OSError as error:
                raise photos.BadPhotoError("away") from error
        return decode(path, size, **options)

    with monkeypatch.context() as patched:
        patched.setattr(photos, "decode", away)
        with pytest.raises(DataError, match=r"b/25.png"):
            encode(run, root, tmp_path, part=1, console=console)
    made = len(list(tmp_path.glob("part-*")))
    assert 0 < made < 46
    assert encode(run, root, tmp_path, part=1, console=console).made == 46 - made
    check(tmp_path, wanted)


def test_a_folder_that_went_away_is_told_and_not_taken_for_lost_photos(run, root, tmp_path, monkeypatch, console):
    moved = tmp_path / "photos"
    shutil.copytree(root, moved)
    decode = photos.decode

    def gone(path, size, **options):
        if path.endswith("a/15.jpg"):
            shutil.rmtree(moved, ignore_errors=True)
        return decode(path, size, **options)

    monkeypatch.setattr(photos, "decode", gone)
    with pytest.raises(DataError, match=r"^--images\b"):
        encode(run, moved, tmp_path / "codes", part=40, console=console)
    assert not list((tmp_path / "codes").glob("part-*"))
