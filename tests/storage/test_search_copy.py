"""The copy of an index gives what the tables give, and is used only while it is of the tables as they are."""

import io
import os
import shutil

import numpy as np
import pyarrow
import pytest
import rich.console

from cib_jax.commands.search import search
from cib_jax.storage.collection import Collection
from cib_jax.storage.photo_table import PhotoTable, Row
from cib_jax.storage.search_copy import ROWS, SearchCopy
from tests.commands import indexing
from tests.data import pictures


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an index, its photos and a query."""
    folder = tmp_path_factory.mktemp("copy")
    indexing.save_hasher(folder / "encoder")
    indexing.fill(folder / "photos", 9)
    shutil.copy(folder / "photos" / "a" / "00.jpg", os.fsencode(folder / "photos") + b"/\xff.jpg")
    pictures.write(folder / "query.jpg", pictures.smooth(50, 60, seed=900))
    indexing.run(folder / "index", folder / "photos", workdir=folder / "encoder")
    return folder


@pytest.fixture
def index(made, tmp_path):
    """An index of its own, in another place."""
    shutil.copytree(made / "index", tmp_path / "index")
    return tmp_path / "index"


def ask(index, query, **options):
    """The paths and metadata that a search finds, nearest first."""
    console = rich.console.Console(file=io.StringIO())
    ((_, code, hits),) = search(index, query, console=console, **options)
    return code.tobytes(), hits


@pytest.mark.parametrize("options", [{"k": 4}, {"radius": 4}, {"folder": "b"}, {"after": "2000"}])
def test_a_search_is_that_of_the_tables(made, index, options):
    expected = ask(Collection.open(index), made / "query.jpg", **options)
    for table in index.glob("*.lance"):  # damaged, so that only the copy can be read
        for file in (table / "data").iterdir():
            file.write_bytes(b"")
    assert ask(index, made / "query.jpg", **options) == expected


def test_features_of_zeros_stay_zeros():
    """As those of a network whose last map is dark everywhere, and as `Hasher.encode_with_features` gives them."""

    class Dark:
        def encode(self, square):
            return np.zeros((1, 8), np.uint8)

        def features(self, square):
            return np.zeros((1, 5), np.float32)

    copy = SearchCopy("", None, pyarrow.table({}), Dark())
    with np.errstate(all="raise"):
        assert not copy.encode_with_features(np.zeros((1, 8, 8, 3), np.uint8))[1].any()


def test_a_changed_index_is_read_itself_until_it_is_updated(made, index):
    before = ask(index, made / "query.jpg", k=20)
    PhotoTable.open(str(index)).put([Row("new.jpg", 1, 2, before[0], 3, 4, b"thumbnail")])
    assert SearchCopy.open(str(index)) is None
    found = ask(index, made / "query.jpg", k=20)[1]
    assert (0, "new.jpg") in [(distance, photo.path) for distance, photo in found]
    indexing.run(index)  # finds that the new photo is gone
    assert len(SearchCopy.open(str(index)).snapshot().keys) == 10
    assert ask(index, made / "query.jpg", k=20) == before


@pytest.mark.parametrize("name", [ROWS, "search-*.zip"])
def test_a_damaged_copy_is_not_used(made, index, name):
    expected = ask(index, made / "query.jpg", k=20)
    (file,) = index.glob(name)
    content = file.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 15)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
        code, hits = ask(index, made / "query.jpg", k=20)
        assert (code, [hit[0] for hit in hits]) == (expected[0], [hit[0] for hit in expected[1]])
    file.unlink()
    assert ask(index, made / "query.jpg", k=20) == expected
