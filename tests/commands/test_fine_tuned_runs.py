"""A run of which a part of the backbone learns: taken up, loaded, in parts and on several devices, to the same bits."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import rich.console
import safetensors.numpy

import cib_jax as cib
from cib_jax.commands.train import train
from cib_jax.config import build
from cib_jax.distributed import multihost
from tests import pretrained, small

ROOT = pathlib.Path(__file__).parents[2]


def same(tree, other) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"blocks": 1, "learning_rate": 1e-4}, marks=pytest.mark.slow),
        {"lora_rank": 2, "blocks": 2, "learning_rate": 1e-2},
    ],
)
def test_a_run_is_taken_up_and_loaded_to_the_same_bits(how, tmp_path, monkeypatch):
    fields = {f"fine_tune__{name}": value for name, value in how.items()}
    network = pretrained.convnet(monkeypatch, tmp_path, 16) | {"frozen": False}
    config = small.config(**network, **fields, epochs=2)
    whole, cut, quiet = tmp_path / "whole", tmp_path / "cut", rich.console.Console(quiet=True)
    results = train(config, whole, console=quiet)
    asked = iter([False] * 2 + [True])
    with monkeypatch.context() as patched:
        patched.setattr(
            "cib_jax.distributed.multihost.sigterm_flag", lambda: contextlib.nullcontext(lambda: next(asked))
        )
        with pytest.raises(multihost.Preempted):
            train(config, cut, console=quiet)
    assert train(config, cut, console=quiet)["map"] == results["map"]
    hasher = cib.Hasher.load(whole)
    assert same(cib.Hasher.load(cut).params, hasher.params)
    query = build.draw_splits(config).query.images
    codes = hasher.encode(np.stack([query[i] for i in range(len(query))]))
    assert np.array_equal(codes, np.load(whole / "codes" / "query_codes.npy"))
    # Though only a part of them stays, other weights than those it stands on are refused.
    weights = safetensors.numpy.load_file(config.backbone_weights)
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({name: tensor + 1 for name, tensor in weights.items()}, other)
    with pytest.raises(cib.Refusal, match="config.backbone_weights"):
        cib.Hasher.load(whole, backbone_weights=str(other))


# One process with 4 devices, since their number is fixed when JAX starts.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import cib_jax as cib
from cib_jax.distributed import sharding
from cib_jax.training import feed, optimizer, state

key = jax.random.key(0)
images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8))
weights = cib.create_encoder(key, backbone="convnet", bits=8, image_size=8)[1]["backbone"]
told = {}
encoder, params, frozen = cib.create_encoder(
    key, backbone="convnet", bits=8, image_size=8, hidden=16, backbone_params=weights,
    fine_tune=cib.FineTune(checkpointing=True, **json.loads(sys.argv[1])))
adam = optimizer.adam(1e-3, 1e-2)
for devices, micro_batch in ((1, 0), (4, 2)):
    method = {"encoder": encoder, "optimizer": adam, "augment": "digits", "micro_batch": micro_batch}
    fed = feed.from_device(images, frozen, seed=0, batch_size=16, method=method, mesh=parallel.mesh(devices, 16))
    (batch,) = fed.epoch_chunks(0)
    after, terms = fed.steps(state.create_train_state(params, adam), batch, 0, key)
    moments = [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(after.opt_state)]
    told[devices] = {name: float(value[0]) for name, value in terms.items()}, moments
json.dump(told, open(sys.argv[2], "w"))
"""


@pytest.mark.parametrize("how", [{"blocks": 1}, pytest.param({"lora_rank": 2}, marks=pytest.mark.slow)])
def test_parts_and_devices_have_the_same_gradients(how, tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    path = tmp_path / "told.json"
    subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(how), str(path)], cwd=ROOT, env=environment, check=True)
    told = json.loads(path.read_text())
    (terms, moments), (other_terms, others) = told["1"], told["4"]
    assert terms["gradient_norm"] > 1e-3
    assert other_terms == pytest.approx(terms, rel=1e-4)
    for mine, theirs in zip(others, moments, strict=True):
        assert np.linalg.norm(np.subtract(mine, theirs)) <= 1e-3 * np.linalg.norm(theirs) + 1e-6
