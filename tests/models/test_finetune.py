"""Which part of a backbone learns: the parts are the whole, what stays has no gradient, and all goes on from there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cib_jax as cib
from cib_jax import exported
from cib_jax.models import conv, dinov2, finetune, registry
from cib_jax.models.finetune import FineTune

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


@functools.cache
def gradient_of(**how):
    """The same for tests to share: each is a program to compile."""
    return gradient(create(**how))


@pytest.fixture(scope="module")
def whole_gradient():
    return gradient_of()


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
    shapes = finetune.outline(registry.get(name), 0)
    listed = finetune._list_of(shapes)
    count = len(shapes[listed])
    assert list(shapes[listed]) == list(range(count))
    last, rest = finetune.split(shapes, 1)
    assert list(last[listed]) == [count - 1]
    assert finetune._joined(last, rest).keys() == shapes.keys()
    assert len(jax.tree.leaves(last)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(shapes))
    everything, nothing = finetune.split(shapes, 0)
    assert (list(everything), nothing) == (list(shapes), {})


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("convnet", ["convolutions", "linear"]),
        ("resnet50", ["stem", "blocks"]),
        ("vgg16", ["convolutions", "fc6", "fc7"]),
        ("dinov2_small", ["stem", "blocks", "norm"]),
        ("clip_vit_b32", ["stem", "first_norm", "blocks", "norm", "projection"]),
        ("siglip_base", ["stem", "blocks", "norm", "pool"]),
    ],
)
def test_a_network_s_parts_are_in_the_order_in_which_images_pass_them(name, order):
    assert list(finetune.outline(registry.get(name), 0)) == order


def test_efficientnet_is_cut_before_its_last_blocks():
    shapes = finetune.outline(registry.get("efficientnet_lite0"), 32)
    assert list(shapes) == ["stem", "blocks", "head"]
    last, rest = finetune.split(shapes, 2)
    assert (list(last), list(last["blocks"])) == (["blocks", "head"], [14, 15])
    assert (list(rest), list(rest["blocks"])) == (["stem", "blocks"], list(range(14)))


def test_the_last_blocks_learn_by_the_whole_networks_gradient_and_the_others_have_none(whole_gradient):
    _, params, frozen = create(blocks=2)
    assert params["backbone"].keys() == {"convolutions", "linear"}
    assert list(params["backbone"]["convolutions"]) == [1, 2]
    assert {name: list(inner) for name, inner in frozen["backbone"].items()} == {"convolutions": [0]}
    mine = gradient_of(blocks=2)
    assert jax.tree.structure(mine) == jax.tree.structure(params)
    expected = {"head": whole_gradient["head"], "backbone": finetune.split(whole_gradient["backbone"], 2)[0]}
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
    optimizer = optax.adam(1e-3)
    programs = []
    for encoder, params, frozen in (create(blocks=3), create()):
        assert (params["head"].keys(), frozen) == ({"hidden", "out"}, {})
        assert same(params["backbone"], jax.tree.map(jnp.asarray, WEIGHTS))
        one = functools.partial(cib.train_step, encoder=encoder, optimizer=optimizer, augment="digits")
        lowered = jax.jit(one).lower(cib.create_train_state(params, optimizer), frozen, IMAGES, KEY)
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
    _, params, frozen = create(lora_rank=2, lora_alpha=6.0)
    assert same(frozen["backbone"], jax.tree.map(jnp.asarray, WEIGHTS))
    mine = gradient_of(lora_rank=2, lora_alpha=6.0)["lora"]
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


@pytest.mark.parametrize("how", [{}, {"blocks": 2}, {"lora_rank": 2, "lora_alpha": 6.0}])
def test_checkpointing_has_the_same_gradients(how):
    assert_near(gradient(create(checkpointing=True, **how)), gradient_of(**how))


def test_a_transformer_s_blocks_are_checkpointed_and_corrected():
    """Two small blocks: every product has a correction, and gradients are the same."""
    design = dinov2.SMALL._replace(patch=4, grid=2, width=8, heads=2, depth=2)
    graph, state = nnx.split(dinov2.DINOv2(nnx.Rngs(0), design))
    state = nnx.to_pure_dict(state)
    ordered = {name: state[name] for name in ("stem", "blocks", "norm")}
    factors = jax.tree.map(lambda leaf: leaf + 0.1, finetune.create(KEY, state, 2))
    assert len(list(finetune.kernels(state))) == 1 + 2 * 6
    assert len(list(finetune.kernels(finetune.split(ordered, 1)[0]))) == 6

    def of_factors(checkpointing):
        def total(factors):
            network = nnx.merge(graph, finetune.corrected(state, factors, 2.0))
            if checkpointing:
                finetune.checkpoint_blocks(network)
            return jnp.sum(network(VIEWS) ** 3)

        return jax.jit(jax.grad(total))(factors)

    plain = of_factors(False)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain["blocks"][1]["mlp"]))
    assert_near(of_factors(True), plain)


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

        return conv.in_chunks(features, images)


def test_checkpointing_takes_less_memory():
    """Of the compiled gradient: what goes into each block is kept, and of what is made in them one block's alone."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Deep(nnx.Rngs(0))))
    images = jax.ShapeDtypeStruct((128, 64, 64, 4), jnp.float32)

    def taken(checkpointing):
        def total(state, images):
            network = nnx.merge(graph, state)
            if checkpointing:
                finetune.checkpoint_blocks(network)
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
    expected = finetune.merged(WEIGHTS, params["lora"], 4.0)
    assert same(hasher.params["backbone"], expected)
    assert same(dataclasses.replace(hasher, batch_size=3).params, hasher.params)
    views = jax.random.normal(KEY, (3, 8, 8, 3))
    ours, theirs = (encoder.features(*held, views) for held in ((hasher.params, hasher.frozen), (params, frozen)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
