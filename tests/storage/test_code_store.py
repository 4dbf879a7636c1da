"""Folders of codes: round trips, damage of any bit, several writers, and folders of something else."""

import errno
import json
import os
import re
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet
import pytest

from cib_jax.errors import CodeStoreError
from cib_jax.storage import code_store
from cib_jax.storage.code_store import DamagedPartError, File, begin, read_corpus, tally

ENCODER = {"bits": 16, "parameters": "abc"}
NAMES = [f"{number:02}.jpg" for number in range(10)]


def started(folder, encoder=ENCODER, part=4, names=NAMES, images="/photos", keep_list=True):
    return begin(folder, encoder, part, names, images, keep_list=keep_list)


def rows(corpus, number, bad=()):
    files = [
        File(NAMES[i], i, 1_700_000_000_123_456_789 + i, "cut" if i in bad else "") for i in corpus.of_part(number)
    ]
    return files, np.array([[file.size, 255] for file in files if not file.reason], np.uint8).reshape(-1, 2)


def write(corpus, number, bad=()):
    code_store.write_part(corpus.path(number), corpus.identity, *rows(corpus, number, bad), {})


def refuse(value, function, *arguments, field="--codes", **options):
    with pytest.raises(CodeStoreError, match=re.escape(value)) as refused:
        function(*arguments, **options)
    assert refused.value.field == field


@pytest.fixture
def whole(tmp_path):
    corpus = started(tmp_path / "codes")
    for number in range(3):
        write(corpus, number, bad=(3, 8))
    return corpus


def test_what_was_written_is_read(whole):
    paths, codes = read_corpus(whole.folder)
    good = [i for i in range(10) if i not in (3, 8)]
    assert paths == [NAMES[i] for i in good]
    assert codes.tolist() == [[i, 255] for i in good]
    assert tally(whole) == (10, 2, [])


def test_a_part_is_plain_parquet(whole):
    """As any other program reads it."""
    table = pyarrow.parquet.read_table(whole.folder / "part-00000002.parquet")
    assert str(table.schema.field("code").type) == "fixed_size_binary[2]"
    assert table.column("path").to_pylist() == ["08.jpg", "09.jpg"]
    assert table.column("code").to_pylist() == [None, b"\x09\xff"]
    assert table.column("size").to_pylist() == [8, 9]
    assert table.column("reason").to_pylist() == ["cut", None]
    assert table.column("modified").cast("int64").to_pylist() == [1_700_000_000_123_456_789 + i for i in (8, 9)]


def test_paths_of_any_bytes(tmp_path):
    names = ["a b/ä.jpg", os.fsdecode(b"caf\xe9.jpg"), "\\xe9.jpg"]
    corpus = started(tmp_path, names=names)
    files = [File(name, 1, 2, "") for name in names]
    code_store.write_part(corpus.path(0), corpus.identity, files, np.zeros((3, 2), np.uint8), {})
    assert read_corpus(tmp_path)[0] == names
    assert code_store.load_names(corpus) == names


def test_a_part_without_any_code(tmp_path):
    corpus = started(tmp_path, part=10)
    write(corpus, 0, bad=range(10))
    paths, codes = read_corpus(tmp_path)
    assert (paths, codes.shape) == ([], (0, 2))


def test_an_unfinished_corpus_is_not_read(whole):
    whole.path(1).unlink()
    assert tally(whole).missing == [1]
    refuse("part-00000001.parquet", read_corpus, whole.folder)
    refuse("_corpus.json", read_corpus, whole.folder.parent)


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    corpus = started(tmp_path_factory.mktemp("one"))
    write(corpus, 0, bad=(2,))
    return corpus


def same_or_damaged(corpus, content, tmp_path):
    path = tmp_path / "part"
    path.write_bytes(content)
    try:
        read = code_store.read_part(path)
    except DamagedPartError:
        return
    # The identity of the corpus may be damaged: then the part is refused as another corpus's.
    files, codes = rows(corpus, 0, bad=(2,))
    assert (read.total, read.unreadable, read.files) == (4, 1, files) and np.array_equal(read.codes, codes)


def test_a_part_cut_short_anywhere_is_known(part, tmp_path):
    content = part.path(0).read_bytes()
    for length in {*range(0, len(content), 7), *range(len(content) - 20, len(content))}:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(DamagedPartError):
            code_store.read_part(tmp_path / "cut")


def test_no_flipped_bit_gets_through(part, tmp_path):
    """Every 37th bit: data, page headers, schema and metadata."""
    content = part.path(0).read_bytes()
    for position in range(0, 8 * len(content), 37):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        same_or_damaged(part, bytes(flipped), tmp_path)


def test_a_wrong_count_in_the_header_is_noticed(part, tmp_path):
    """The digest is of rows alone, but the count of unreadable files must agree with them."""
    table = pyarrow.parquet.read_table(part.path(0))
    header = json.loads(table.schema.metadata[b"cib_jax"]) | {"unreadable": 0}
    wrong = table.replace_schema_metadata({b"cib_jax": json.dumps(header).encode()})
    pyarrow.parquet.write_table(wrong, tmp_path / "part")
    with pytest.raises(DamagedPartError):
        code_store.read_part(tmp_path / "part")


def flip(path):
    """Turns a bit of the last code of a part."""
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)


def test_a_damaged_part_ends_the_reading(whole):
    flip(whole.path(1))
    refuse("part-00000001.parquet", read_corpus, whole.folder)
    whole.path(1).write_bytes(b"PAR1")
    assert tally(whole).missing == [1]


def test_many_may_write_the_same_part_and_one_read_it_meanwhile(tmp_path):
    corpus = started(tmp_path)
    failed, done = [], threading.Event()

    def writing():
        try:
            for _ in range(30):
                write(corpus, 0)
        except Exception as error:
            failed.append(error)

    def reading():
        while not done.is_set():
            try:
                found = corpus.load_part(0)
                assert found is None or np.array_equal(found.codes, rows(corpus, 0)[1])
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=writing) for _ in range(4)]
    reader = threading.Thread(target=reading)
    for thread in (*threads, reader):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    assert not failed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "_corpus.json",
        "_files.parquet",
        "part-00000000.parquet",
    ]


def test_what_a_killed_process_left_is_tidied_away(tmp_path):
    corpus = started(tmp_path)
    (tmp_path / ".part-00000000.parquet.0123").write_bytes(b"half")
    write(corpus, 0)
    assert not list(tmp_path.glob(".part*"))


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    corpus = started(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refuse("no space left on device", write, corpus, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_corpus.json", "_files.parquet"]


def test_what_is_not_this_corpus_is_refused(whole, tmp_path):
    folder = whole.folder
    assert started(folder).identity == whole.identity
    assert started(folder, images="/moved").identity == whole.identity
    refuse("'abc' → 'abd'", started, folder, encoder=ENCODER | {"parameters": "abd"})
    refuse("--part=4", started, folder, part=5)
    changed = [*NAMES[:3], *NAMES[4:], "new.jpg", "newer.jpg"]
    refuse(
        "2 came (the first: new.jpg) and 1 went (the first: 03.jpg)", started, folder, names=changed, field="--images"
    )
    (folder / "_files.parquet").unlink()
    refuse("_files.parquet", started, folder, names=NAMES[:9])
    other = started(tmp_path / "other", encoder=ENCODER | {"parameters": "abd"})
    write(other, 1)
    os.replace(other.path(1), whole.path(1))
    refuse("part-00000001.parquet", tally, whole)
    refuse("part-00000001.parquet", read_corpus, folder)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    refuse("thesis.tex", started, tmp_path)
    refuse("thesis.tex", started, tmp_path / "thesis.tex" / "codes")


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[" * 100_000, json.dumps({"format": 1, "encoder": 3})])
def test_a_damaged_description_is_reported_and_written_again(whole, content):
    path = whole.folder / "_corpus.json"
    path.write_text(content)
    refuse("_corpus.json", read_corpus, whole.folder)
    path.unlink()
    started(whole.folder)
    assert len(read_corpus(whole.folder)[0]) == 8


@pytest.mark.parametrize(
    "change",
    [{"encoder": {}}, {"encoder": {"bits": "16"}}, {"encoder": {"bits": 12}}, {"encoder": []}, {"part": 0.5},
     {"part": True}, {"files": -1, "parts": 0}, {"files": "10"}, {"parts": None}],
)  # fmt: skip
def test_a_description_with_other_values_is_reported(whole, change):
    path = whole.folder / "_corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refuse("_corpus.json", read_corpus, whole.folder)


def test_pipes_in_a_corpus_are_not_waited_for(whole):
    for name in ("part-00000001.parquet", "_corpus.json"):
        (whole.folder / name).unlink()
        os.mkfifo(whole.folder / name)
        refuse(name, read_corpus, whole.folder)


def test_of_two_corpora_begun_at_once_one_goes_on(tmp_path):
    """The one with the surviving description: the other notices before its first part."""
    first = started(tmp_path)
    (tmp_path / "_corpus.json").unlink()
    second = started(tmp_path, part=5)
    second.validate_folder()
    refuse("--part=5", first.validate_folder)


@hypothesis.given(files=st.integers(1, 300), part=st.integers(1, 50))
def test_parts_hold_every_file_once(files, part):
    corpus = code_store.Corpus(None, {}, part, files, "", "")
    assert [number for p in range(corpus.parts) for number in corpus.of_part(p)] == list(range(files))
    assert all(corpus.of_part(p) for p in range(corpus.parts))
