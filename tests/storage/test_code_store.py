"""A corpus's folder of parts: what is written is read, what is damaged or another's is refused."""

import errno
import json
import os
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet
import pytest

from cib_jax.storage import code_store
from cib_jax.errors import CodeStoreError as CorpusError
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
    code_store.write_shard(corpus.path(number), corpus.identity, *rows(corpus, number, bad), {})


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
    code_store.write_shard(corpus.path(0), corpus.identity, files, np.zeros((3, 2), np.uint8), {})
    assert read_corpus(tmp_path)[0] == names
    assert code_store.read_list(corpus) == names


def test_a_part_without_any_code(tmp_path):
    corpus = started(tmp_path, part=10)
    write(corpus, 0, bad=range(10))
    paths, codes = read_corpus(tmp_path)
    assert (paths, codes.shape) == ([], (0, 2))


def test_an_unfinished_corpus_is_not_read(whole):
    whole.path(1).unlink()
    assert tally(whole).missing == [1]
    with pytest.raises(
        CorpusError, match=r"1 of 3 parts are missing \(the first: part-00000001.parquet\); run the same"
    ):
        read_corpus(whole.folder)
    with pytest.raises(CorpusError, match="is no folder of a corpus's codes"):
        read_corpus(whole.folder.parent)


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    corpus = started(tmp_path_factory.mktemp("one"))
    write(corpus, 0, bad=(2,))
    return corpus


def same_or_damaged(corpus, content, tmp_path):
    path = tmp_path / "part"
    path.write_bytes(content)
    try:
        head, read = code_store.read_shard(path)
    except DamagedPartError:
        return
    files, codes = rows(corpus, 0, bad=(2,))
    assert (head.corpus == corpus.identity) == (head == (corpus.identity, 4, 1))
    assert read.files == files and np.array_equal(read.codes, codes)


def test_a_part_cut_short_anywhere_is_known(part, tmp_path):
    content = part.path(0).read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(DamagedPartError):
            code_store.read_shard(tmp_path / "cut")


@hypothesis.settings(max_examples=1500, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_no_flipped_bit_gets_through(part, tmp_path, data):
    content = bytearray(part.path(0).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    same_or_damaged(part, bytes(content), tmp_path)


def flip(path):
    """Turns a bit of the last code of a part."""
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)


def test_a_damaged_part_ends_the_reading(whole):
    flip(whole.path(1))
    with pytest.raises(CorpusError, match=r"part-00000001.parquet is damaged \(.*; run the same --mode=encode command"):
        read_corpus(whole.folder)
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
                found = corpus.find(0)
                assert found is None or np.array_equal(found[1].codes, rows(corpus, 0)[1])
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


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    corpus = started(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CorpusError, match=r"part-00000000.parquet cannot be written \(no space left on device\); make"):
        write(corpus, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_corpus.json", "_files.parquet"]


def test_what_is_not_this_corpus_is_refused(whole, tmp_path):
    folder = whole.folder
    assert started(folder).identity == whole.identity
    assert started(folder, images="/moved").identity == whole.identity
    with pytest.raises(CorpusError, match=r"another encoder \(parameters: 'abc' → 'abd'\); give the --workdir"):
        started(folder, encoder=ENCODER | {"parameters": "abd"})
    with pytest.raises(CorpusError, match="parts of 4 files, not of 5; give --part=4"):
        started(folder, part=5)
    told = r"2 came \(the first: new.jpg\) and 1 went \(the first: 03.jpg\); leave --images out to finish"
    with pytest.raises(CorpusError, match=told):
        started(folder, names=[*NAMES[:3], *NAMES[4:], "new.jpg", "newer.jpg"])
    (folder / "_files.parquet").unlink()
    with pytest.raises(CorpusError, match=r"_files.parquet, which keeps the list of files, cannot be read"):
        started(folder, names=NAMES[:9])
    other = started(tmp_path / "other", encoder=ENCODER | {"parameters": "abd"})
    write(other, 1)
    os.replace(other.path(1), whole.path(1))
    for reading in (lambda: tally(whole), lambda: read_corpus(folder)):
        with pytest.raises(CorpusError, match=r"part-00000001.parquet is of another corpus than .*; move it elsewhere"):
            reading()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CorpusError, match=r"holds files, but no codes of a corpus \(thesis.tex, …\); choose another"):
        started(tmp_path)
    with pytest.raises(CorpusError, match="cannot be used"):
        started(tmp_path / "thesis.tex" / "codes")


@pytest.mark.parametrize("content", ["", "{}", "[1]", json.dumps({"format": 1, "encoder": 3})])
def test_a_damaged_description_is_told_and_written_again(whole, content):
    path = whole.folder / "_corpus.json"
    path.write_text(content)
    with pytest.raises(CorpusError, match=r"corpus.json is damaged .*; remove it, and the same --mode=encode command"):
        read_corpus(whole.folder)
    path.unlink()
    started(whole.folder)
    assert len(read_corpus(whole.folder)[0]) == 8


def test_of_two_corpora_begun_at_once_one_goes_on(tmp_path):
    """The one whose description stands: the other finds it out before its first part."""
    first = started(tmp_path)
    (tmp_path / "_corpus.json").unlink()
    second = started(tmp_path, part=5)
    second.check()
    with pytest.raises(CorpusError, match="parts of 5 files, not of 4"):
        first.check()


@hypothesis.given(files=st.integers(1, 300), part=st.integers(1, 50))
def test_parts_hold_every_file_once(files, part):
    corpus = code_store.Corpus(None, {}, part, files, "", "")
    assert [number for p in range(corpus.parts) for number in corpus.of_part(p)] == list(range(files))
    assert all(corpus.of_part(p) for p in range(corpus.parts))
