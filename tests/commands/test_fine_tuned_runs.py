"""Runs that train a part of the backbone: resumed and loaded to the same bits; on several devices: test_sharding.py."""

import contextlib

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

pytestmark = pytest.mark.usefixtures("compiled_to_run", "few_digits")


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
    network = pretrained.convnet(monkeypatch, tmp_path, 8) | {"frozen": False}
    config = small.config(**small.FEW_DIGITS, **network, **fields, epochs=2)
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
    with pytest.raises(cib.UserError, match="weights"):
        cib.Hasher.load(whole, backbone_weights=str(other))
