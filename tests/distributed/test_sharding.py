"""A batch spread over 1, 2, 4 and 8 simulated devices: the same loss, codes, gradients and parameters as on one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from cib_jax import errors
from cib_jax.distributed import sharding

ROOT = pathlib.Path(__file__).parents[2]

# One process with 8 devices, since their number is fixed when JAX starts; it tells everything that the tests look at.
PROGRAM = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import PartitionSpec as P
import cib_jax as cib
from cib_jax import objective, binary
from cib_jax.distributed import sharding
from cib_jax.training import feed, loop, state
from cib_jax.training.checkpoint import Progress

told = {"devices": jax.local_device_count()}
generator = np.random.default_rng(0)
logits = jnp.asarray(generator.normal(size=(2, 16, 8)), jnp.float32)
key = jax.random.key(0)

known = jnp.asarray(generator.normal(size=(16, 5)), jnp.float32)

def terms(name, devices):
    def shared(key, a, b, known):
        axis = "data" if devices > 1 else None
        coordinates = known if name == "diffusion" else None
        value, gradients = jax.value_and_grad(
            lambda a, b: objective.cib_loss(key, a, b, objective=name, beta=0.1, coordinates=coordinates,
                                            axis=axis)[0], argnums=(0, 1))(a, b)
        return spread.total(value, axis), gradients
    if devices > 1:
        shared = jax.shard_map(shared, mesh=parallel.mesh(devices, 16), in_specs=(P(), P("data"), P("data"), P("data")),
                               out_specs=(P(), P("data")), check_vma=False)
    value, gradients = jax.jit(shared)(key, *logits, known)
    return [float(value), *(np.asarray(g).ravel().tolist() for g in gradients)]

for name in ("naive_cl", "cl_hash", "cibhash", "diffusion"):
    told[name] = {devices: terms(name, devices) for devices in (1, 2, 8)}

images = generator.integers(0, 256, (48, 8, 8, 3), np.uint8)
features = generator.normal(size=(48, 12)).astype(np.float32)
stored = generator.normal(size=(48, 3, 12)).astype(np.float32)

def leaves(params):
    return [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(params)]

def trained(devices, data, views=0, **options):
    losses = []
    hasher = cib.fit(data, bits=8, hidden=16, epochs=2, batch_size=16, devices=devices, views=views, **options,
                     on_epoch=lambda report: losses.append(report.terms))
    return {"losses": losses, "params": leaves(hasher.params)}

runs = {
    "features": lambda n: trained(n, features, backbone="none", augment="noise"),
    "stored views": lambda n: trained(n, stored, backbone="none", augment="stored"),
}
for (name, run), some in zip(runs.items(), ((1, 4), (1, 2))):
    told[name] = {devices: run(devices) for devices in some}

encoder, params, frozen = cib.create_encoder(key, backbone="convnet", bits=8, image_size=16, hidden=16)
bank = jnp.asarray(generator.normal(size=(4, 48, 256)), jnp.float16)
def looped(fed, params, optimizer):
    losses = []
    end, _ = loop.run(state.create_train_state(params, optimizer), Progress(), steps=fed.steps,
                      epoch_chunks=fed.epoch_chunks, key=key, epochs=2, batch_size=16,
                      on_epoch=lambda s, report: losses.append(report.terms))
    return {"losses": losses, "params": leaves(end.params)}

def from_bank(devices):
    adam = optax.adam(1e-3)
    method = {"encoder": encoder, "optimizer": adam}
    fed = feed.from_bank(bank, seed=0, batch_size=16, method=method, mesh=parallel.mesh(devices, 16))
    return looped(fed, {"head": params["head"]}, adam)

def from_device(devices):
    # Not Adam, which makes whole steps of the rounding of a gradient that is nearly 0.
    sgd = optax.sgd(0.1)
    method = {"encoder": encoder, "optimizer": sgd, "augment": "digits"}
    fed = feed.from_device(jnp.asarray(images), frozen, seed=0, batch_size=16, method=method,
                           mesh=parallel.mesh(devices, 16))
    return looped(fed, params, sgd)

def from_stream(devices):
    sgd = optax.sgd(0.1)
    method = {"encoder": encoder, "optimizer": sgd, "augment": "digits"}
    fed = feed.from_stream(images, frozen, seed=0, batch_size=16, stored_size=0, method=method,
                           mesh=parallel.mesh(devices, 16))
    return looped(fed, params, sgd)

for name, run, some in (("bank", from_bank, (1, 8)), ("images", from_device, (1, 4))):
    told[name] = {devices: run(devices) for devices in some}
# On one device, streamed images train to the bits of resident ones: tests/jobs/test_train.py.
told["streamed images"] = {1: told["images"][1], 8: from_stream(8)}

hasher = cib.Hasher(encoder, params, frozen, batch_size=3)
told["codes"] = {n: dataclasses.replace(hasher, devices=n).encode(images).tolist() for n in (1, 2, 8)}
codes = generator.integers(0, 256, (2, 300, 2), np.uint8)
labels = generator.integers(0, 4, (2, 300))
told["searched"] = [codes.tolist(), labels.tolist()]
told["map"] = cib.mean_average_precision(*codes, *labels, k=50)  # its blocks go round all devices
json.dump(told, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel") / "told.json"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", PROGRAM, str(path)], cwd=ROOT, env=environment, check=True)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["naive_cl", "cl_hash", "cibhash", "diffusion"])
def test_shares_of_the_loss_sum_up_and_gradients_are_those_of_the_whole(told, name):
    """Every code of the batch is a negative of every other, whichever device it is on, and gets its gradient for it."""
    assert told["devices"] == 8
    value, *gradients = told[name]["1"]
    for devices in ("2", "8"):
        assert told[name][devices][0] == pytest.approx(value, rel=1e-6)
        for mine, whole in zip(told[name][devices][1:], gradients, strict=True):
            np.testing.assert_allclose(mine, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["bank", "images", "streamed images", "features", "stored views"])
def test_training_comes_to_the_same_on_any_number_of_devices(told, name):
    one = told[name].pop("1")
    for devices in told[name]:
        for mine, whole in zip(told[name][devices]["losses"], one["losses"], strict=True):
            assert mine == pytest.approx(whole, rel=1e-5)
        for mine, whole in zip(told[name][devices]["params"], one["params"], strict=True):
            np.testing.assert_allclose(mine, whole, atol=1e-5)


def test_encoding_on_any_number_of_devices_gives_the_same_codes(told):
    """48 images, a batch of 3 for each device: 8 devices have two rounds."""
    one = told["codes"]["1"]
    assert np.shape(one) == (48, 1) and len(np.unique(one)) >= 5
    assert told["codes"]["2"] == one and told["codes"]["8"] == one


def test_a_ranking_whose_blocks_go_round_all_devices_is_that_of_a_plain_loop(told):
    (queries, database), (mine, theirs) = (np.asarray(part) for part in told["searched"])
    precisions = []
    for code, label in zip(queries.astype(np.uint8), mine, strict=True):
        distances = np.unpackbits(code ^ database.astype(np.uint8), axis=1).sum(1)
        hits = theirs[np.argsort(distances, kind="stable")[:50]] == label
        precisions.append((np.cumsum(hits) / np.arange(1, 51))[hits].mean() if hits.any() else 0.0)
    assert told["map"] == pytest.approx(np.mean(precisions), rel=1e-12)


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
