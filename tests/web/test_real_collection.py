"""A real index behind the server: its answers are those of its own search and of a plain loop."""

import functools
import shutil

import jax
import pytest

import cib_jax as cib
from cib_jax.commands.index import index
from cib_jax.data import photos as photos_lib
from cib_jax.storage.collection import Collection
from cib_jax.web import server
from configs import default
from tests.web import fake
from tests.web.conftest import until


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """Returns the photos' folder, the index, and a function that indexes again."""
    folder = tmp_path_factory.mktemp("indexed")
    fake.fill(folder / "photos")
    encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
    cib.Hasher(encoder, params, frozen).save(folder / "hasher")
    again = functools.partial(index, folder / "index", folder / "photos", config=default.get_config())
    again(workdir=folder / "hasher")
    return folder / "photos", folder / "index", again


def test_an_index_is_served(running, indexed):
    root, uri, _ = indexed
    collection = Collection.open(uri)
    with running(collection) as served:
        assert served.json("/health") == (200, {"status": "ok", "photos": 20, "bits": 16})
        for number in (0, 19):
            (photo,) = collection.photos([number])
            answer = served.json(f"/search?id={photo.id}&k=7")[1]
            found = [(result["distance"], collection.number_of(result["id"])) for result in answer["results"]]
            assert found == [tuple(hit) for hit in fake.nearest(collection.codes, collection.codes[number])[:7]]
            assert served.ask(f"/thumbnail/{photo.id}")[2] == photo.thumbnail
            assert served.ask(f"/image/{photo.id}")[0] == 200
            content = (root / photo.path).read_bytes()
            by_photo = served.json("/search?k=7", method="POST", body=content)[1]
            code = collection.encode(photos_lib.decode_with_thumbnail(content, collection.side).square[None])[0]
            assert by_photo["query"]["code"] == bytes(code).hex() == answer["query"]["code"]
            assert by_photo["results"] == answer["results"]
        assert len(served.json("/search?k=1000")[1]["results"]) == 20


def test_newly_indexed_photos_are_served_without_a_restart(running, indexed):
    """One photo is added, one changes and one is removed; the other ids stay."""
    root, uri, again = indexed
    lines = []
    with running(Collection.open(uri)) as served:
        gone, changed, kept = served.api.collection.photos([0, 1, 2])
        assert served.ask(f"/thumbnail/{changed.id}")[2] == changed.thumbnail
        with server.renewing(served.api, lambda collection: collection.renewed(), lines.append, seconds=0.05):
            (root / gone.path).unlink()
            (root / changed.path).write_bytes((root / kept.path).read_bytes())
            shutil.copy(root / kept.path, root / "new.jpg")
            again()

            def renewed():
                found = {result["path"]: result for result in served.json("/search?k=1000")[1]["results"]}
                codes = {found[path]["code"] for path in (changed.path, kept.path, "new.jpg") if path in found}
                return len(found) == 20 and gone.path not in found and len(codes) == 1

            until(renewed)
        assert served.ask(f"/thumbnail/{gone.id}")[0] == 404
        assert served.ask(f"/thumbnail/{changed.id}")[2] == served.ask(f"/thumbnail/{kept.id}")[2] == kept.thumbnail
        found = served.json(f"/search?id={kept.id}&k=3")[1]["results"]
        assert {result["id"] for result in found if result["distance"] == 0} >= {changed.id, kept.id}
    assert lines[-1] == "20 photos now"


def test_an_index_that_is_deleted_or_replaced_answers_503_until_it_is_back(running, indexed, tmp_path, capfd):
    """Made anew by the same encoder, it has the same version as before, and its photos other rows."""
    root, uri, _ = indexed
    copy, lines = tmp_path / "index", []
    again = functools.partial(index, copy, root, config=default.get_config())
    encoder, params, frozen = cib.create_encoder(jax.random.key(1), backbone="convnet", bits=16, image_size=16)
    cib.Hasher(encoder, params, frozen).save(tmp_path / "other")
    again(workdir=uri.parent / "hasher")
    with running(Collection.open(copy)) as served:
        id = served.api.collection.photos([0])[0].id

        def statuses():
            paths = (f"/search?id={id}&k=7", f"/photo?id={id}", f"/thumbnail/{id}", "/search", "/health")
            return {served.ask(path)[0] for path in paths}

        with server.renewing(served.api, lambda collection: collection.renewed(), lines.append, seconds=3600):
            shutil.rmtree(copy)
            assert statuses() == {503}
            assert statuses() == {503} and len(lines) == 1  # printed once
            again(workdir=tmp_path / "other")
            assert statuses() == {503} and len(lines) == 2
            for _ in range(2):
                shutil.rmtree(copy)
                again(workdir=uri.parent / "hasher")
                assert statuses() == {200}
    assert "Traceback" not in capfd.readouterr().err
