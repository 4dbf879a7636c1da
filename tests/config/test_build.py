"""What a config's words become: streams of random numbers, and weights that are loaded only where they are needed."""

import jax
import numpy as np
import pytest

import configs.cifar
from cib_jax.config import build
from tests import small


def fine_tuned():
    config = configs.cifar.get_config()
    config.frozen = False
    config.train.views = 0
    config.image_size = 32
    return config


def test_a_fine_tuned_backbone_is_taken_from_its_checkpoint_alone(monkeypatch):
    """Of the same structure as at the start of training, but without reading the published weights again."""
    _, started, nothing, fingerprint = build.encoder(fine_tuned())
    assert (nothing, fingerprint) == ({}, "")
    monkeypatch.setattr(build.weights, "load_pretrained", None)
    _, template, _, _ = build.encoder(fine_tuned(), trained=True)
    shapes = [jax.tree.map(np.shape, params) for params in (started, template)]
    assert shapes[0] == shapes[1]


def test_a_frozen_backbone_is_loaded_and_known_by_its_fingerprint():
    config = configs.cifar.get_config()
    _, params, frozen, fingerprint = build.encoder(config, trained=True)
    assert set(params) == {"head"}
    assert set(frozen) == {"backbone"}
    assert len(fingerprint) == 16


def test_the_streams_of_a_seed_differ_and_so_do_seeds():
    data = [
        tuple(jax.random.key_data(build.key(small.config(seed=seed, data__seed=seed), stream)).tolist())
        for seed in (0, 1)
        for stream in build.STREAMS
    ]
    assert len(set(data)) == len(data) == 2 * len(build.STREAMS)


def test_runs_that_differ_in_their_seed_alone_share_splits_and_bank():
    one, other, elsewhere = (small.config(**fields) for fields in ({}, {"seed": 1}, {"data__seed": 1}))
    bank = [jax.random.key_data(build.key(config, "view bank")).tolist() for config in (one, other, elsewhere)]
    assert bank[0] == bank[1] != bank[2]
    labels = [build.draw_splits(config).query.labels for config in (one, other, elsewhere)]
    assert np.array_equal(labels[0], labels[1])
    assert not np.array_equal(labels[0], labels[2])


@pytest.mark.parametrize("name", ["k", "batch_size"])
def test_sizes_are_checked_against_the_images_there_are(name):
    with pytest.raises(build.ConfigError, match=f"config.{name}: 5000 is larger than the"):
        build.draw_splits(small.config(**{name: 5000}))
