"""An index as the job makes it, served: the same answers as its own search gives, and as a plain loop."""

import functools
import shutil
import time

import jax
import pytest

import cib_jax as cib
from cib_jax.commands.index import index
from cib_jax.data.photos import decode_with_thumbnail
from cib_jax.errors import IndexFolderError
from cib_jax.storage.collection import Collection
from cib_jax.web import server
from configs import default
from tests.web import fake
from tests.web.conftest import running


@pytest.fixture(scope="module")
def collection(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
    cib.Hasher(encoder, params, frozen).save(folder / "hasher")
    index(folder / "index", photos, workdir=folder / "hasher", config=default.get_config())
    return Collection.open(folder / "index")


def test_an_index_is_served(collection, photos):
    with running(collection) as served:
        assert served.json("/health") == (200, {"status": "ok", "photos": 20, "bits": 16})
        for number in (0, 19):
            (photo,) = collection.photos([number])
            answer = served.json(f"/search?id={photo.id}&k=7")[1]
            found = [(result["distance"], collection.number_of(result["id"])) for result in answer["results"]]
            assert found == [tuple(hit) for hit in fake.nearest(collection.codes, collection.codes[number])[:7]]
            assert served.ask(f"/thumbnail/{photo.id}")[2] == photo.thumbnail
            assert served.ask(f"/image/{photo.id}")[0] == 200
            content = (photos / photo.path).read_bytes()
            asked = served.json("/search?k=7", method="POST", body=content)[1]
            code = collection.encode(decode_with_thumbnail(content, collection.side).square[None])[0]
            assert asked["query"]["code"] == bytes(code).hex() == answer["query"]["code"]
            assert asked["results"] == answer["results"]
        assert len(served.json("/search?k=1000")[1]["results"]) == 20


def test_what_is_indexed_meanwhile_is_served_without_a_new_start(tmp_path, monkeypatch):
    """A photo that comes, one that changes, one that goes; ids stay those of the others."""
    root, told = tmp_path / "photos", []
    fake.fill(root)
    encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
    cib.Hasher(encoder, params, frozen).save(tmp_path / "hasher")
    again = functools.partial(index, tmp_path / "index", root, config=default.get_config())
    again(workdir=tmp_path / "hasher")
    monkeypatch.setattr(server, "_RENEW_EVERY", 0.05)
    with running(Collection.open(tmp_path / "index")) as served:
        api = served.app.state.api
        before = api.collection
        gone, changed, kept = before.photos([0, 1, 2])
        assert served.ask(f"/thumbnail/{changed.id}")[2] == changed.thumbnail
        with server._renewing(api, lambda collection: collection.renewed(), told.append):
            (root / gone.path).unlink()
            (root / changed.path).write_bytes((root / kept.path).read_bytes())
            shutil.copy(root / kept.path, root / "new.jpg")
            again()
            deadline = time.monotonic() + 60
            while api.collection is before and time.monotonic() < deadline:
                time.sleep(0.02)
            while len(api.collection) != 20 or api.collection.number_of(gone.id) is not None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.2)
        assert served.ask(f"/thumbnail/{gone.id}")[0] == 404
        assert served.ask(f"/thumbnail/{changed.id}")[2] == served.ask(f"/thumbnail/{kept.id}")[2] == kept.thumbnail
        found = served.json(f"/search?id={kept.id}&k=3")[1]["results"]
        assert {result["id"] for result in found if result["distance"] == 0} >= {changed.id, kept.id}
        assert "new.jpg" in {result["path"] for result in served.json("/search?k=1000")[1]["results"]}
    assert told[-1] == "20 photos now"


def test_a_thumbnail_of_the_collection_before_is_not_kept_for_the_next(photos):
    before, after = fake.FakeCollection(photos), fake.FakeCollection(photos)
    after._photos = [photo._replace(thumbnail=b"\xff\xd8\xffnew") for photo in after._photos]
    original = before.photos
    with running(before) as served:
        api = served.app.state.api

        def meanwhile(numbers, *, thumbnails=True):
            found = original(numbers, thumbnails=thumbnails)
            api.take(after)
            return found

        before.photos = meanwhile
        path = f"/thumbnail/{after.photos([0])[0].id}"
        served.ask(path)
        assert served.ask(path)[2] == b"\xff\xd8\xffnew"


def test_what_goes_wrong_once_ends_no_renewing(collection, capfd):
    told, tried = [], []

    def renew(served):
        tried.append(True)
        if len(tried) == 1:
            raise RuntimeError("once")
        raise IndexFolderError("--index: again")

    with running(collection) as served, pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_RENEW_EVERY", 0.01)
        with server._renewing(served.app.state.api, renew, told.append):
            deadline = time.monotonic() + 30
            while not told and time.monotonic() < deadline:
                time.sleep(0.01)
    assert told and "RuntimeError: once" in capfd.readouterr().err


def test_an_index_that_cannot_be_read_anew_is_told_and_served_as_it_was(collection):
    told = []

    def renew(_):
        raise IndexFolderError("--index: the share is away")

    with running(collection) as served, pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_RENEW_EVERY", 0.01)
        with server._renewing(served.app.state.api, renew, told.append):
            while not told:
                time.sleep(0.01)
        assert served.json("/health")[0] == 200
    assert told[0].startswith("What was indexed meanwhile is not served yet: --index: the share is away")
