"""A batch sharded over 1, 4 and 8 simulated devices: the same loss, codes, gradients and parameters as on one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import cib_jax as cib
from cib_jax import errors
from cib_jax.distributed import sharding
from cib_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What tests/distributed/eight_devices.py computes."""
    folder = tmp_path_factory.mktemp("devices")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "tests.distributed.eight_devices", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return json.loads((folder / "found.json").read_text()) | {"checkpoints": str(folder / "checkpoints")}


@pytest.mark.parametrize("name", ["naive_cl", "cl_hash", "cibhash", "diffusion", "own"])
def test_shares_of_the_loss_sum_up_and_gradients_are_those_of_the_whole(found, name):
    """Every code of the batch is a negative of every other, whichever device it is on, and gets its gradient for it."""
    assert found["devices"] == 8
    value, *gradients = found[name]["1"]
    total, *of_shares = found[name]["8"]
    assert total == pytest.approx(value, rel=1e-6)
    for mine, whole in zip(of_shares, gradients, strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["bank", "images", "features", "stored views"])
def test_training_ends_with_the_same_on_any_number_of_devices(found, name):
    one = found[name].pop("1")
    for devices in found[name]:
        for mine, whole in zip(found[name][devices]["losses"], one["losses"], strict=True):
            assert mine == pytest.approx(whole, rel=1e-5)
        for mine, whole in zip(found[name][devices]["params"], one["params"], strict=True):
            np.testing.assert_allclose(mine, whole, atol=1e-5)


def test_a_step_in_parts_on_several_devices_is_that_of_one_batch(found):
    """Of a backbone whose last block is trained."""
    (terms, moments), (other_terms, others) = found["last block"]
    assert terms["gradient_norm"] > 1e-3
    assert other_terms == pytest.approx(terms, rel=1e-4)
    for mine, theirs in zip(others, moments, strict=True):
        assert np.linalg.norm(np.subtract(mine, theirs)) <= 1e-3 * np.linalg.norm(theirs) + 1e-6


@pytest.mark.parametrize("name", ["features", "two views"])
def test_a_step_in_a_loop_of_ones_own_is_that_of_one_device(found, name):
    """By `jax.shard_map` with and without its checks, and by `jax.jit`; on meshes with and without explicit axes."""
    one, *others = found["own loops"][name]
    assert one[0] > 1e-3
    for other in others:
        assert other == pytest.approx(one, rel=1e-5)


def test_a_step_on_images_in_a_loop_of_ones_own_is_traced_with_its_checks(found):
    """By `jax.shard_map`, and on one device."""
    assert found["own loops"]["images"] == [[], []]


def test_pure_functions_take_arrays_of_explicit_meshes(found):
    assert len(found["explicit"]) == 8
    assert max(found["explicit"].values()) < 1e-5, found["explicit"]


def test_a_checkpoint_of_eight_devices_is_restored_on_one(found):
    _, params, _ = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=8, image_size=8, hidden=16)
    template = cib.create_train_state(params, optax.adam(1e-3))
    with Checkpoints(found["checkpoints"], read_only=True) as checkpoints:
        state, progress, _ = checkpoints.restore(template)
    assert progress.step == 7
    for restored, expected in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        assert restored.devices() == set(jax.local_devices())
        np.testing.assert_array_equal(restored, expected)


def test_an_index_learns_from_photos_that_the_devices_do_not_divide(found):
    assert found["index"] == [3, 2]


def test_encoding_on_any_number_of_devices_gives_the_same_codes(found):
    """48 images, a batch of 3 for each device: 8 devices have two rounds."""
    one = found["codes"]["1"]
    assert np.shape(one) == (48, 1) and len(np.unique(one)) >= 5
    assert found["codes"]["8"] == one


def test_a_ranking_whose_blocks_go_round_all_devices_is_that_of_a_plain_loop(found):
    (queries, database), (mine, theirs) = (np.asarray(part) for part in found["searched"])
    precisions = []
    for code, label in zip(queries.astype(np.uint8), mine, strict=True):
        distances = np.unpackbits(code ^ database.astype(np.uint8), axis=1).sum(1)
        hits = theirs[np.argsort(distances, kind="stable")[:50]] == label
        precisions.append((np.cumsum(hits) / np.arange(1, 51))[hits].mean() if hits.any() else 0.0)
    assert found["map"] == pytest.approx(np.mean(precisions), rel=1e-12)


def test_one_device_needs_no_mesh():
    assert sharding.make_mesh(1, 64) is None
    assert jax.local_device_count() == 1 and sharding.make_mesh(0, 64) is None


def test_missing_devices_and_batches_that_do_not_divide_are_rejected(monkeypatch):
    with pytest.raises(errors.DevicesError) as error:
        sharding.make_mesh(3, 64)
    assert error.value.field == "config.devices"
    monkeypatch.setattr(jax, "local_devices", lambda: list(range(3)))
    with pytest.raises(errors.DevicesError) as error:
        sharding.make_mesh(0, 64)
    assert error.value.field == "config.batch_size"
