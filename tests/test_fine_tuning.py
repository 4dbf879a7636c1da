"""Which part of a backbone learns: the parts are the whole, what stays has no gradient, and all goes on from there."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
import safetensors.numpy
from flax import nnx

import cib_jax as cib
from cib_jax import config as config_lib
from cib_jax import exported, fine_tuning, from_config, lora
from cib_jax.backbones import convolution, registry
from cib_jax.fine_tuning import FineTune
from cib_jax.jobs import preemption
from cib_jax.jobs.train import train
from tests import pretrained, small

pytestmark = pytest.mark.usefixtures("compiled_quickly")
ROOT = pathlib.Path(__file__).parents[1]
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
VIEWS = jnp.asarray(np.random.default_rng(1).normal(size=(6, 8, 8, 3)), jnp.float32)
KEY = jax.random.key(5)
WEIGHTS = cib.create_encoder(jax.random.key(3), backbone="convnet", bits=8, image_size=8)[1]["backbone"]


def create(**how):
    """A ConvNet of known weights, which so counts as pretrained."""
    frozen = how.pop("frozen", None)
    return cib.create_encoder(
        jax.random.key(0), backbone="convnet", bits=16, image_size=8, hidden=16, backbone_params=WEIGHTS, frozen=frozen,
        fine_tune=FineTune(**how),
    )  # fmt: skip


def gradient(made):
    """Of a weighted sum of logits of a few views; pure, so that little has to be compiled."""
    encoder, params, frozen = made
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(len(VIEWS), 16)), jnp.float32)
    return jax.jit(jax.grad(lambda params: jnp.sum(weights * encoder.logits(params, frozen, VIEWS))))(params)


@pytest.fixture(scope="module")
def whole_gradient():
    return gradient(create())


def same(tree, other) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


def assert_near(mine, theirs):
    for a, b in zip(*map(jax.tree.leaves, (mine, theirs)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-6


@pytest.mark.parametrize("name", [name for name, one in registry.BACKBONES.items() if one.takes == "images"])
def test_the_blocks_of_every_backbone_are_found_between_its_input_and_its_output(name):
    shapes = fine_tuning.outline(registry.get(name), 0)
    listed = fine_tuning._list_of(shapes)
    count = len(shapes[listed])
    assert list(shapes[listed]) == list(range(count))
    last, rest = fine_tuning.split(shapes, 1)
    assert list(last[listed]) == [count - 1]
    assert fine_tuning._joined(last, rest).keys() == shapes.keys()
    assert len(jax.tree.leaves(last)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(shapes))
    everything, nothing = fine_tuning.split(shapes, 0)
    assert (list(everything), nothing) == (list(shapes), {})


def test_efficientnet_is_cut_before_its_last_blocks():
    shapes = fine_tuning.outline(registry.get("efficientnet_lite0"), 32)
    assert list(shapes) == ["stem", "blocks", "head"]
    last, rest = fine_tuning.split(shapes, 2)
    assert (list(last), list(last["blocks"])) == (["blocks", "head"], [14, 15])
    assert (list(rest), list(rest["blocks"])) == (["stem", "blocks"], list(range(14)))


def test_the_last_blocks_learn_by_the_whole_networks_gradient_and_the_others_have_none(whole_gradient):
    made = create(blocks=2)
    _, params, frozen = made
    assert params["backbone"].keys() == {"convolutions", "linear"}
    assert list(params["backbone"]["convolutions"]) == [1, 2]
    assert {name: list(inner) for name, inner in frozen["backbone"].items()} == {"convolutions": [0]}
    mine = gradient(made)
    assert jax.tree.structure(mine) == jax.tree.structure(params)
    expected = {"head": whole_gradient["head"], "backbone": fine_tuning.split(whole_gradient["backbone"], 2)[0]}
    assert_near(mine, expected)


def test_what_stays_costs_no_backward_pass():
    """Of three convolutions: one gradient of a kernel where the last one learns, without one of what goes into it."""

    def passes(**how):
        encoder, params, frozen = create(**how)
        views = jnp.zeros((2, 8, 8, 3))

        def total(params):
            return jnp.sum(encoder.features(params, frozen, views) ** 2)

        return str(jax.make_jaxpr(jax.grad(total))(params)).count("conv_general_dilated[")

    forward, last, everything = passes(frozen=True), passes(blocks=1), passes()
    assert forward < last < everything


def test_all_that_can_learn_is_the_network_trained_whole():
    """All blocks of a network that has nothing before them: the same parameters, and the same program of a step."""
    optimiser = optax.adam(1e-3)
    programs = []
    for encoder, params, frozen in (create(blocks=3), create()):
        assert (params["head"].keys(), frozen) == ({"hidden", "out"}, {})
        assert same(params["backbone"], jax.tree.map(jnp.asarray, WEIGHTS))
        one = functools.partial(cib.train_step, encoder=encoder, optimiser=optimiser, augment="digits")
        lowered = jax.jit(one).lower(cib.create_train_state(params, optimiser), frozen, IMAGES, KEY)
        programs.append(lowered.as_text())
    assert programs[0] == programs[1]


@pytest.mark.parametrize("how", [{"blocks": 1}, {"lora_rank": 2}, {"lora_rank": 2, "blocks": 1}])
def test_features_are_at_first_those_of_the_weights(how):
    made, plain = create(**how), create(frozen=True)
    views = jax.random.normal(KEY, (3, 8, 8, 3))
    features = [jax.jit(encoder.features)(params, frozen, views) for encoder, params, frozen in (made, plain)]
    assert np.array_equal(*features)
    assert same(made[1]["head"], plain[1]["head"])


def test_corrections_learn_by_the_gradient_of_the_kernels(whole_gradient):
    """At the start, with B = 0: that of B is s · Aᵀ · G, G being the kernel's own, and A has none yet."""
    made = create(lora_rank=2, lora_alpha=6.0)
    _, params, frozen = made
    assert same(frozen["backbone"], jax.tree.map(jnp.asarray, WEIGHTS))
    mine = gradient(made)["lora"]
    assert mine.keys() == {"convolutions", "linear"}
    of_kernels = whole_gradient["backbone"]
    for path in (("linear",), ("convolutions", 0), ("convolutions", 1), ("convolutions", 2)):
        found, factors, theirs = mine, params["lora"], of_kernels
        for name in path:
            found, factors, theirs = found[name], factors[name], theirs[name]
        a, kernel = np.float64(factors["kernel"]["a"]), np.float64(theirs["kernel"])
        expected = 6.0 / 2 * a.T @ kernel.reshape(-1, kernel.shape[-1])
        assert np.linalg.norm(found["kernel"]["b"] - expected) <= 1e-4 * np.linalg.norm(expected)
        assert not np.any(found["kernel"]["a"])


@pytest.mark.parametrize("how", [{}, {"blocks": 2}, {"lora_rank": 2}])
def test_checkpointing_has_the_same_gradients(how):
    assert_near(gradient(create(checkpointing=True, **how)), gradient(create(**how)))


class Wide(nnx.Module):
    """A block that makes eight times what it takes, and what it takes again."""

    def __init__(self, rngs):
        self.expand = nnx.Linear(4, 32, rngs=rngs)
        self.project = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.project(nnx.relu(self.expand(x)))


class Deep(nnx.Module):
    """Six such blocks, a few images at a time, as the published networks go on a CPU."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Wide(rngs) for _ in range(6)])

    def __call__(self, images):
        def features(x):
            for block in self.blocks:
                x = block(x)
            return x.mean((1, 2))

        return convolution.in_chunks(features, images)


def test_checkpointing_takes_less_memory():
    """Of the compiled gradient: what goes into each block is kept, and of what is made in them one block's alone."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Deep(nnx.Rngs(0))))
    images = jax.ShapeDtypeStruct((128, 64, 64, 4), jnp.float32)

    def taken(checkpointing):
        def total(state, images):
            network = nnx.merge(graph, state)
            if checkpointing:
                fine_tuning.checkpoint_blocks(network)
            return jnp.sum(network(images) ** 2)

        return jax.jit(jax.grad(total)).lower(state, images).compile().memory_analysis().temp_size_in_bytes

    assert taken(True) < taken(False) / 2


@pytest.mark.parametrize("how", [{"blocks": 1}, {"lora_rank": 2}])
def test_a_hasher_holds_plain_weights_and_gives_the_same_codes_wherever_it_is_kept(how, tmp_path):
    encoder, params, frozen = create(**how)
    trained = jax.tree.map(lambda leaf: leaf + 0.01, params)
    hasher = cib.Hasher(encoder, trained, frozen, batch_size=4, devices=1)
    assert (hasher.params.keys(), hasher.frozen) == ({"head", "backbone"}, {})
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), hasher.params["backbone"], WEIGHTS)
    assert moved["linear"]["kernel"]
    assert moved["convolutions"][0]["kernel"] == ("lora_rank" in how)
    codes = hasher.encode(IMAGES)
    hasher.save(tmp_path / "hasher")
    loaded = cib.Hasher.load(tmp_path / "hasher")
    assert same(loaded.params, hasher.params)
    assert np.array_equal(loaded.encode(IMAGES), codes)
    hasher.export(tmp_path / "encoder.zip")
    assert np.array_equal(exported.load(tmp_path / "encoder.zip").encode(IMAGES), codes)


def test_fit_trains_the_part_that_it_is_told_to():
    def fitted(**how):
        return cib.fit(
            IMAGES, bits=16, image_size=8, hidden=16, augment="digits", epochs=1, batch_size=12, devices=1,
            backbone_params=WEIGHTS, fine_tune=FineTune(**how),
        ).params["backbone"]  # fmt: skip

    after = fitted(blocks=1, learning_rate=1e-5)
    assert same(after["convolutions"][1], jax.tree.map(jnp.asarray, WEIGHTS["convolutions"][1]))
    # Adam's first and only step is a rate long.
    furthest = np.abs(after["linear"]["kernel"] - WEIGHTS["linear"]["kernel"]).max()
    np.testing.assert_allclose(furthest, 1e-5, rtol=0.02)


def test_corrections_are_taken_into_the_weights_once():
    encoder, params, frozen = create(lora_rank=2)
    params["lora"] = jax.tree.map(lambda leaf: leaf + 0.1, params["lora"])
    hasher = cib.Hasher(encoder, params, frozen)
    expected = lora.merged(WEIGHTS, params["lora"], 4.0)
    assert same(hasher.params["backbone"], expected)
    assert same(dataclasses.replace(hasher, batch_size=3).params, hasher.params)
    views = jax.random.normal(KEY, (3, 8, 8, 3))
    ours, theirs = (encoder.features(*held, views) for held in ((hasher.params, hasher.frozen), (params, frozen)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "how", [{"blocks": 1, "learning_rate": 1e-4}, {"lora_rank": 2, "blocks": 2, "learning_rate": 1e-2}]
)
def test_a_run_is_taken_up_and_loaded_to_the_same_bits(how, tmp_path, monkeypatch):
    fields = {f"fine_tune__{name}": value for name, value in how.items()}
    network = pretrained.convnet(monkeypatch, tmp_path, 16) | {"frozen": False}
    config = small.config(**network, **fields, epochs=2)
    whole, cut, quiet = tmp_path / "whole", tmp_path / "cut", rich.console.Console(quiet=True)
    results = train(config, whole, console=quiet)
    asked = iter([False] * 2 + [True])
    with monkeypatch.context() as patched:
        patched.setattr("cib_jax.jobs.preemption.noted", lambda: contextlib.nullcontext(lambda: next(asked)))
        with pytest.raises(preemption.Preempted):
            train(config, cut, console=quiet)
    assert train(config, cut, console=quiet)["map"] == results["map"]
    hasher = cib.Hasher.load(whole)
    assert same(cib.Hasher.load(cut).params, hasher.params)
    query = from_config.draw_splits(config).query.images
    codes = hasher.encode(np.stack([query[i] for i in range(len(query))]))
    assert np.array_equal(codes, np.load(whole / "codes" / "query_codes.npy"))
    # Though only a part of them stays, other weights than those it stands on are refused.
    weights = safetensors.numpy.load_file(config.backbone_weights)
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({name: tensor + 1 for name, tensor in weights.items()}, other)
    with pytest.raises(cib.Refusal, match="the run was trained on backbone weights"):
        cib.Hasher.load(whole, backbone_weights=str(other))


# One process with 4 devices, since their number is fixed when JAX starts.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import cib_jax as cib
from cib_jax import parallel
from cib_jax.training import feed, optimiser, state

key = jax.random.key(0)
images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8))
weights = cib.create_encoder(key, backbone="convnet", bits=8, image_size=8)[1]["backbone"]
told = {}
for how in ({"blocks": 1}, {"lora_rank": 2}):
    encoder, params, frozen = cib.create_encoder(
        key, backbone="convnet", bits=8, image_size=8, hidden=16, backbone_params=weights,
        fine_tune=cib.FineTune(checkpointing=True, **how))
    adam = optimiser.adam(1e-3, 1e-2)
    for devices, micro_batch in ((1, 0), (4, 2)):
        method = {"encoder": encoder, "optimiser": adam, "augment": "digits", "micro_batch": micro_batch}
        fed = feed.from_device(images, frozen, seed=0, batch_size=16, method=method, mesh=parallel.mesh(devices, 16))
        (batch,) = fed.epoch_chunks(0)
        after, terms = fed.steps(state.create_train_state(params, adam), batch, 0, key)
        moments = [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(after.opt_state)]
        told[f"{how} {devices}"] = {name: float(value[0]) for name, value in terms.items()}, moments
json.dump(told, open(sys.argv[1], "w"))
"""


def test_parts_and_devices_have_the_same_gradients(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    path = tmp_path / "told.json"
    subprocess.run([sys.executable, "-c", PROGRAM, str(path)], cwd=ROOT, env=environment, check=True)
    told = json.loads(path.read_text())
    for how in ({"blocks": 1}, {"lora_rank": 2}):
        (terms, moments), (other_terms, others) = told[f"{how} 1"], told[f"{how} 4"]
        assert terms["gradient_norm"] > 1e-3
        assert other_terms == pytest.approx(terms, rel=1e-4)
        for mine, theirs in zip(others, moments, strict=True):
            assert np.linalg.norm(np.subtract(mine, theirs)) <= 1e-3 * np.linalg.norm(theirs) + 1e-6


EFFICIENTNET = {"backbone": "efficientnet_lite0", "frozen": False, "image_size": 32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fine_tune__blocks": -1}, r"config.fine_tune.blocks: -1 must be 0 or more"),
        ({"fine_tune__lora_alpha": 0.0}, r"config.fine_tune.lora_alpha: 0.0 must be greater than 0"),
        ({"fine_tune__blocks": 1}, r"config.fine_tune.blocks: convnet starts from random weights.* set it to 0"),
        ({"fine_tune__lora_rank": 4}, r"config.fine_tune.lora_rank: convnet starts from random weights"),
        (
            EFFICIENTNET | {"fine_tune__blocks": 17},
            r"config.fine_tune.blocks: 17 is more than the 16 blocks of efficientnet_lite0; lower it, or 0",
        ),
        (
            EFFICIENTNET | {"fine_tune__lora_rank": 17},
            r"config.fine_tune.lora_rank: 17 is more than the 16 that blocks/0/project/kernel of",
        ),
        *(
            (
                EFFICIENTNET | {"frozen": True, f"fine_tune__{name}": value},
                rf"config.fine_tune.{name}: {value} is for a backbone that learns, and this one is frozen; set frozen",
            )
            for name, value in (("blocks", 1), ("lora_rank", 2), ("checkpointing", True), ("learning_rate", 0.1))
        ),
        (EFFICIENTNET | {"fine_tune__blocks": 1, "train__views": 2}, r"config.train.views: features can be computed"),
        (
            {
                "data__name": "features", "backbone": "none", "augment": "noise", "frozen": True, "image_size": 0,
                "fine_tune__checkpointing": True,
            },
            r"config.fine_tune.checkpointing: it is for images; set it to False for features",
        ),
    ],
)  # fmt: skip
def test_a_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.check(small.unchecked(**fields))


def test_the_same_is_refused_of_functions():
    with pytest.raises(cib.Refusal, match=r"^fine_tune.blocks: 4 is more than the 3 blocks of convnet"):
        create(blocks=4)
    with pytest.raises(cib.Refusal, match=r"^fine_tune.lora_rank: convnet starts from random weights"):
        cib.fit(IMAGES, batch_size=6, fine_tune=FineTune(lora_rank=2))
    with pytest.raises(ValueError, match=r"views: 2 views are computed once only of a frozen backbone"):
        cib.fit(IMAGES, batch_size=6, backbone_params=WEIGHTS, image_size=8, views=2, fine_tune=FineTune(lora_rank=2))
    with pytest.raises(cib.Refusal, match=r"^fine_tune.learning_rate: nan must be 0 or more"):
        create(learning_rate=float("nan"))


def test_a_run_of_an_earlier_version_differs_in_nothing():
    mine = config_lib.flatten(small.config())
    theirs = {name: value for name, value in mine.items() if not name.startswith("fine_tune.")}
    assert config_lib.differences(mine, theirs) == []
    asked = config_lib.flatten(small.config(fine_tune__learning_rate=0.5))
    assert config_lib.differences(asked, theirs) == ["fine_tune.learning_rate: 0.0 → 0.5"]
