"""Fine-tuning: the trainable parts of backbones, LoRA against NumPy in float64, checkpointing, and refused options."""

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
from cib_jax.config import schema
from cib_jax.errors import ConfigError
from cib_jax.models import conv, dinov2, finetune, registry
from cib_jax.models.finetune import FineTune
from tests import small

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
VIEWS = jnp.asarray(np.random.default_rng(1).normal(size=(6, 8, 8, 3)), jnp.float32)
KEY = jax.random.key(5)
WEIGHTS = cib.create_encoder(jax.random.key(3), backbone="convnet", bits=8, image_size=8)[1]["backbone"]


def create(**how):
    """A ConvNet with given weights, which therefore counts as pretrained."""
    frozen = how.pop("frozen", None)
    return cib.create_encoder(
        jax.random.key(0), backbone="convnet", bits=16, image_size=8, hidden=16, backbone_params=WEIGHTS, frozen=frozen,
        fine_tune=FineTune(**how),
    )  # fmt: skip


def gradient(made):
    """Returns the gradient of a weighted sum of the logits of a few views."""
    encoder, params, frozen = made
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(len(VIEWS), 16)), jnp.float32)
    return jax.jit(jax.grad(lambda params: jnp.sum(weights * encoder.logits(params, frozen, VIEWS))))(params)


@functools.cache
def gradient_of(**how):
    """Returns the gradient of `create(**how)`; tests share it, since each one is a program to compile."""
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


ORDERS = {
    "convnet": ["convolutions", "linear"],
    "efficientnet_lite0": ["stem", "blocks", "head"],
    "resnet50": ["stem", "blocks"],
    "vgg16": ["convolutions", "fc6", "fc7"],
    "dinov2_small": ["stem", "blocks", "norm"],
    "clip_vit_b32": ["stem", "first_norm", "blocks", "norm", "projection"],
    "siglip_base": ["stem", "blocks", "norm", "pool"],
}
"""The entries of one network of each kind, in the order in which images pass them."""


@pytest.mark.parametrize("name", ORDERS)
def test_every_network_is_split_before_its_last_block(name):
    shapes = finetune.state_shapes(registry.get(name), 0)
    order = ORDERS[name]
    assert list(shapes) == order
    (listed,) = {"blocks", "convolutions"} & set(order)
    position, count = order.index(listed), len(shapes[listed])
    assert list(shapes[listed]) == list(range(count))
    last, rest = finetune.split_blocks(shapes, 1)
    assert (list(last), list(last[listed])) == (order[position:], [count - 1])
    assert (set(rest), list(rest[listed])) == (set(order[: position + 1]), list(range(count - 1)))
    joined = finetune.join_states(last, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(shapes)
    everything, nothing = finetune.split_blocks(shapes, 0)
    assert (list(everything), nothing) == (order, {})


def test_the_last_blocks_learn_by_the_whole_networks_gradient_and_the_others_have_none(whole_gradient):
    _, params, frozen = create(blocks=2)
    assert params["backbone"].keys() == {"convolutions", "linear"}
    assert list(params["backbone"]["convolutions"]) == [1, 2]
    assert {name: list(inner) for name, inner in frozen["backbone"].items()} == {"convolutions": [0]}
    mine = gradient_of(blocks=2)
    assert jax.tree.structure(mine) == jax.tree.structure(params)
    expected = {"head": whole_gradient["head"], "backbone": finetune.split_blocks(whole_gradient["backbone"], 2)[0]}
    assert_near(mine, expected)


def test_frozen_blocks_cost_no_backward_pass():
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


@pytest.fixture(scope="module")
def plain_features():
    encoder, params, frozen = create(frozen=True)
    return jax.jit(encoder.features)(params, frozen, VIEWS), params["head"]


@pytest.mark.parametrize("how", [{"blocks": 1}, {"lora_rank": 2, "blocks": 1}])
def test_features_are_at_first_those_of_the_weights(how, plain_features):
    encoder, params, frozen = create(**how)
    features, head = plain_features
    assert np.array_equal(jax.jit(encoder.features)(params, frozen, VIEWS), features)
    assert same(params["head"], head)


def test_factors_learn_by_the_gradient_of_the_kernels(whole_gradient):
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


@pytest.mark.parametrize("how", [{"blocks": 2}, {"lora_rank": 2, "lora_alpha": 6.0}])
def test_checkpointing_has_the_same_gradients(how):
    assert_near(gradient(create(checkpointing=True, **how)), gradient_of(**how))


def test_a_transformer_s_blocks_are_checkpointed_and_have_factors():
    """Two small blocks: every matrix has factors, and gradients are the same."""
    design = dinov2.SMALL._replace(patch=4, grid=2, width=8, heads=2, depth=2)
    graph, state = nnx.split(dinov2.DINOv2(nnx.Rngs(0), design))
    state = nnx.to_pure_dict(state)
    ordered = {name: state[name] for name in ("stem", "blocks", "norm")}
    factors = jax.tree.map(lambda leaf: leaf + 0.1, finetune.create_lora(KEY, state, 2))
    assert len(list(finetune.kernel_shapes(state))) == 1 + 2 * 6
    assert len(list(finetune.kernel_shapes(finetune.split_blocks(ordered, 1)[0]))) == 6

    def of_factors(checkpointing):
        def total(factors):
            network = nnx.merge(graph, finetune.apply_lora(state, factors, 2.0))
            if checkpointing:
                finetune.checkpoint_blocks(network)
            return jnp.sum(network(VIEWS) ** 3)

        return jax.jit(jax.grad(total))(factors)

    plain = of_factors(False)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain["blocks"][1]["mlp"]))
    assert_near(of_factors(True), plain)


class Wide(nnx.Module):
    """A block with eight times as many channels inside as outside."""

    def __init__(self, rngs):
        self.expand = nnx.Linear(4, 32, rngs=rngs)
        self.project = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.project(nnx.relu(self.expand(x)))


class Deep(nnx.Module):
    """Six such blocks, for a few images at a time, as in the published networks on a CPU."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Wide(rngs) for _ in range(6)])

    def __call__(self, images):
        def features(x):
            for block in self.blocks:
                x = block(x)
            return x.mean((1, 2))

        return conv.in_chunks(features, images)


def test_checkpointing_takes_less_memory():
    """The compiled gradient keeps the inputs of all blocks, and the inner maps of one block only."""
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


def test_fit_trains_the_chosen_part():
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


def test_factors_are_merged_into_the_weights_once():
    encoder, params, frozen = create(lora_rank=2)
    params["lora"] = jax.tree.map(lambda leaf: leaf + 0.1, params["lora"])
    hasher = cib.Hasher(encoder, params, frozen)
    expected = finetune.merge_lora(WEIGHTS, params["lora"], 4.0)
    assert same(hasher.params["backbone"], expected)
    assert same(dataclasses.replace(hasher, batch_size=3).params, hasher.params)
    views = jax.random.normal(KEY, (3, 8, 8, 3))
    features = jax.jit(encoder.features)
    ours, theirs = (features(*held, views) for held in ((hasher.params, hasher.frozen), (params, frozen)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


GENERATOR = np.random.default_rng(0)


def normal(*shape):
    return GENERATOR.normal(size=shape).astype(np.float32)


STATE = {
    "stem": {"kernel": normal(3, 3, 2, 6), "bias": normal(6)},
    "blocks": {
        0: {"depthwise": {"kernel": normal(3, 3, 1, 6)}, "project": {"kernel": normal(1, 1, 6, 4), "bias": normal(4)}},
        1: {"scale": normal(4)},
    },
    "linear": {"kernel": normal(4, 5), "bias": normal(5)},
}
SCALE = 2.5


@pytest.fixture(scope="module")
def factors():
    """Factors as in the middle of training: neither is 0."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(normal(*leaf.shape)), finetune.create_lora(jax.random.key(0), STATE, 2)
    )


def test_matrices_and_convolutions_have_factors_and_depthwise_ones_have_none():
    assert list(finetune.kernel_shapes(STATE)) == [
        (("stem", "kernel"), (18, 6)),
        (("blocks", 0, "project", "kernel"), (6, 4)),
        (("linear", "kernel"), (4, 5)),
    ]
    made = finetune.create_lora(jax.random.key(0), STATE, 2)
    assert jax.tree.map(np.shape, made) == {
        "stem": {"kernel": {"a": (18, 2), "b": (2, 6)}},
        "blocks": {0: {"project": {"kernel": {"a": (6, 2), "b": (2, 4)}}}},
        "linear": {"kernel": {"a": (4, 2), "b": (2, 5)}},
    }


def test_the_start_is_the_state_itself_and_not_flat():
    made = finetune.create_lora(jax.random.key(0), STATE, 2)
    for together in (finetune.apply_lora, finetune.merge_lora):
        jax.tree.map(np.testing.assert_array_equal, together(STATE, made, SCALE), STATE)
    a = np.asarray(
        finetune.create_lora(jax.random.key(1), {"fc": {"kernel": normal(400, 30)}}, 20)["fc"]["kernel"]["a"]
    )
    assert abs(a.std() * 400**0.5 - 1) < 0.05
    assert abs(a.mean() * 400**0.5) < 0.05


def test_a_kernel_is_w_plus_the_scaled_product(factors):
    for together in (finetune.apply_lora, finetune.merge_lora):
        found = together(STATE, factors, SCALE)
        for path in (("stem",), ("blocks", 0, "project"), ("linear",)):
            state, pair, mine = STATE, factors, found
            for name in path:
                state, pair, mine = state[name], pair[name], mine[name]
            a, b = (np.asarray(pair["kernel"][name], np.float64) for name in "ab")
            shape = state["kernel"].shape
            expected = state["kernel"] + SCALE * np.einsum("ir,ro->io", a, b).reshape(shape)
            np.testing.assert_allclose(mine["kernel"], expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(mine["bias"], state["bias"])
        np.testing.assert_array_equal(
            found["blocks"][0]["depthwise"]["kernel"], STATE["blocks"][0]["depthwise"]["kernel"]
        )
        np.testing.assert_array_equal(found["blocks"][1]["scale"], STATE["blocks"][1]["scale"])


def test_merged_weights_are_rounded_once(factors):
    """To float32, also from kernels in bfloat16."""
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), STATE)
    pair = factors["linear"]["kernel"]
    exact = np.float64(half["linear"]["kernel"]) + SCALE * np.float64(pair["a"]) @ np.float64(pair["b"])
    np.testing.assert_array_equal(
        finetune.merge_lora(half, factors, SCALE)["linear"]["kernel"], exact.astype(np.float32)
    )


def test_gradients_are_those_of_the_formula(factors):
    """With G the gradient of W: that of A is s · G · Bᵀ, that of B is s · Aᵀ · G."""
    weights = jax.tree.map(lambda leaf: jnp.asarray(normal(*np.shape(leaf))), STATE)

    def loss(factors):
        whole = finetune.apply_lora(STATE, factors, SCALE)
        return sum(jnp.sum(w * jnp.sin(x)) for w, x in zip(*map(jax.tree.leaves, (weights, whole)), strict=True))

    gradients = jax.jit(jax.grad(loss))(factors)
    for path in (("stem",), ("blocks", 0, "project"), ("linear",)):
        state, pair, weight, mine = STATE, factors, weights, gradients
        for name in path:
            state, pair, weight, mine = state[name], pair[name], weight[name], mine[name]
        a, b = (np.asarray(pair["kernel"][name], np.float64) for name in "ab")
        columns = b.shape[1]
        kernel = np.float64(state["kernel"]).reshape(-1, columns) + SCALE * a @ b
        of_kernel = np.float64(weight["kernel"]).reshape(-1, columns) * np.cos(kernel)
        np.testing.assert_allclose(mine["kernel"]["a"], SCALE * of_kernel @ b.T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mine["kernel"]["b"], SCALE * a.T @ of_kernel, rtol=1e-4, atol=1e-4)


EFFICIENTNET = {"backbone": "efficientnet_lite0", "frozen": False, "image_size": 32}


@pytest.mark.parametrize(
    ("fields", "name", "values"),
    [
        ({"fine_tune__blocks": -1}, "blocks", "-1"),
        ({"fine_tune__lora_alpha": 0.0}, "lora_alpha", "0.0"),
        ({"fine_tune__blocks": 1}, "blocks", "convnet"),
        ({"fine_tune__lora_rank": 4}, "lora_rank", "convnet"),
        (EFFICIENTNET | {"fine_tune__blocks": 17}, "blocks", "16.*17"),
        (EFFICIENTNET | {"fine_tune__lora_rank": 17}, "lora_rank", "16.*blocks/0/project/kernel.*17"),
        *(
            (EFFICIENTNET | {"frozen": True, f"fine_tune__{name}": value}, name, str(value))
            for name, value in (("blocks", 1), ("lora_rank", 2), ("checkpointing", True), ("learning_rate", 0.1))
        ),
        (
            {
                "data__name": "features", "backbone": "none", "augment": "noise", "frozen": True, "image_size": 0,
                "fine_tune__checkpointing": True,
            },
            "checkpointing", "",
        ),
    ],
)  # fmt: skip
def test_a_config_that_cannot_work_is_refused(fields, name, values):
    with pytest.raises(ConfigError, match=values or None) as caught:
        schema.validate(small.unchecked(**fields))
    assert caught.value.field == f"config.fine_tune.{name}"


def test_views_are_not_computed_once_for_a_backbone_that_learns():
    with pytest.raises(ConfigError) as caught:
        schema.validate(small.unchecked(**EFFICIENTNET, fine_tune__blocks=1, train__views=2))
    assert caught.value.field == "config.train.views"
    with pytest.raises(ValueError, match="views"):
        cib.fit(IMAGES, batch_size=6, backbone_params=WEIGHTS, image_size=8, views=2, fine_tune=FineTune(lora_rank=2))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({"blocks": 4}, "blocks"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"blocks": 1.5}, "blocks"),
        ({"lora_rank": 1.5}, "lora_rank"),
        ({"lora_rank": 2, "lora_alpha": float("inf")}, "lora_alpha"),
    ],
)
def test_functions_refuse_the_same(how, name):
    with pytest.raises(ConfigError) as caught:
        create(**how)
    assert caught.value.field == f"fine_tune.{name}"


@pytest.mark.parametrize("name", ["blocks", "lora_rank"])
def test_random_weights_are_refused(name):
    """Whether published ones exist or not."""
    with pytest.raises(ConfigError, match="convnet") as caught:
        cib.fit(IMAGES, batch_size=6, fine_tune=FineTune(**{name: 2}))
    assert caught.value.field == f"fine_tune.{name}"
    with pytest.raises(ConfigError, match="efficientnet_lite0"):
        cib.create_encoder(
            jax.random.key(0), backbone="efficientnet_lite0", bits=8, pretrained=False, fine_tune=FineTune(**{name: 1})
        )


def test_a_run_of_an_earlier_version_does_not_differ():
    mine = schema.flatten(small.config())
    theirs = {name: value for name, value in mine.items() if not name.startswith("fine_tune.")}
    assert schema.differences(mine, theirs) == []
    changed = schema.flatten(small.config(fine_tune__learning_rate=0.5))
    assert schema.differences(changed, theirs) == ["fine_tune.learning_rate: 0.0 → 0.5"]
