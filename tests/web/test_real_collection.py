"""An index as the job makes it, served: the same answers as its own search gives, and as a plain loop."""

import jax
import pytest

import cib_jax as cib
from cib_jax.collection import Collection
from cib_jax.data import photos as photos_lib
from cib_jax.jobs.index import index
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
            code = collection.encode(photos_lib.see(content, collection.side).square[None])[0]
            assert asked["query"]["code"] == bytes(code).hex() == answer["query"]["code"]
            assert asked["results"] == answer["results"]
        assert len(served.json("/search?k=1000")[1]["results"]) == 20
