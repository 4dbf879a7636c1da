"""The encoder that an index learns: batches of few photos, refusals. Trained ones: test_index.py, test_sharding.py."""

import io

import numpy as np
import pytest
import rich.console

from cib_jax.commands import index
from cib_jax.data import photos
from cib_jax.data.inputs import Photos
from cib_jax.errors import ConfigError, DataError
from cib_jax.storage.collection import Collection
from tests import pretrained
from tests.commands import indexing


@pytest.mark.parametrize(
    ("count", "devices", "batch", "part", "expected"),
    [
        (500, 4, 64, 8, (64, 8)),  # enough photos: as the config says
        (64, 4, 64, 0, (64, 0)),
        (63, 4, 64, 0, (60, 0)),
        (22, 8, 64, 0, (16, 0)),
        (63, 2, 64, 16, (32, 16)),
        (63, 4, 64, 16, (60, 0)),  # 15 on each device are fewer than 16
        (17, 1, 64, 0, (17, 0)),
    ],
)
def test_a_batch_of_few_photos_can_be_shared_and_cut(count, devices, batch, part, expected):
    assert index.batch_for(count, devices, indexing.config(batch_size=batch, micro_batch=part)) == expected


def test_fewer_photos_than_devices_are_refused():
    with pytest.raises(DataError, match="got 20") as refused:
        index.batch_for(20, 32, indexing.config(batch_size=64))
    assert refused.value.field == "--images"


def quiet():
    return rich.console.Console(file=io.StringIO())


def test_features_are_refused():
    found = Photos("/photos", [], "/photos", 1)
    with pytest.raises(ConfigError) as refused:
        index.train_index_encoder(found, indexing.config(backbone="none"), quiet(), {})
    assert refused.value.field == "config.backbone"


CONVNET = {
    "backbone": "convnet",
    "image_size": 8,
    "hidden": 8,
    "epochs": 1,
    "bits": 16,
    "frozen": False,
    "train__views": 0,
    "data__stored_size": 20,
    "data__train_images": 20,
}


def test_a_first_index_decodes_each_photo_once(tmp_path, monkeypatch):
    """Unless it changes meanwhile; the codes are those of photos that are decoded anew."""
    indexing.fill(tmp_path / "photos", 22)
    read, decode = [], photos.decode_with_thumbnail

    def decode_and_note(path, *arguments, **options):
        read.append(path)
        return decode(path, *arguments, **options)

    monkeypatch.setattr(photos, "decode_with_thumbnail", decode_and_note)
    done, _ = indexing.run(tmp_path / "i", tmp_path / "photos", settings=indexing.config(**CONVNET))
    assert done.added == len(read) == len(set(read)) == 22
    hasher = Collection.open(tmp_path / "i").hasher
    assert indexing.held(tmp_path / "i") == indexing.expected(tmp_path / "photos", hasher)


def test_an_interrupted_first_index_goes_on_after_the_last_view(tmp_path, monkeypatch):
    indexing.fill(tmp_path / "photos", 20)
    frozen = pretrained.convnet(monkeypatch, tmp_path, 8) | {"train__views": 2, "cache__dir": str(tmp_path / "cache")}
    config = indexing.config(**CONVNET | frozen)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(index.fitting, "train_hasher", interrupt)
        with pytest.raises(KeyboardInterrupt):
            indexing.run(tmp_path / "i", tmp_path / "photos", settings=config)
    done, printed = indexing.run(tmp_path / "i", tmp_path / "photos", settings=config)
    assert done.photos == 20 and f"read from {tmp_path / 'cache'}" in printed


def test_the_seed_decides_the_sample_and_the_codes(tmp_path):
    """Twenty of 22 photos: the same encoder again from the same seeds, another one from another sample."""
    indexing.fill(tmp_path, 22)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    found = Photos(str(tmp_path), names, str(tmp_path), 1)
    heads = []
    for seed in (0, 0, 1):
        config = indexing.config(**CONVNET, data__seed=seed)
        hasher = index.train_index_encoder(found, config, quiet(), {})
        assert (hasher.encoder.bits, hasher.stored_size, hasher.batch_size) == (16, config.data.stored_size or 8, 7)
        heads.append(np.asarray(hasher.params["head"]["out"]["kernel"]))
    assert np.array_equal(heads[0], heads[1]) and not np.array_equal(heads[0], heads[2])
