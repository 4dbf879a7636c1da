"""The step against Adam written out by hand, and its promises: determinism, donation, frozen parts, one method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cib_jax as cib
from cib_jax.augment import features as feature_augment
from cib_jax.errors import ConfigError
from cib_jax.random_streams import fold_by_name
from cib_jax.training import train_step
from cib_jax.training.train_step import Method

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def made():
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0), backbone="convnet", bits=16, image_size=8, hidden=32
    )
    optimizer = optax.adam(1e-3)
    step = jax.jit(functools.partial(cib.train_step, encoder=encoder, optimizer=optimizer, augment="digits"))
    return encoder, params, frozen, optimizer, step


@pytest.fixture(scope="module")
def views_of(made):
    """A function from the key of a step to the two views of each image."""
    two_views = jax.jit(functools.partial(made[0].two_views, family="digits"))
    return lambda key: two_views(fold_by_name(key, "views"), IMAGES)


def test_a_step_is_adams_first(made, views_of):
    """Adam's first step is learning rate × g / (|g| + ε), whatever the gradient's size."""
    encoder, params, frozen, optimizer, step = made
    key = jax.random.key(5)
    after, terms = step(cib.create_train_state(params, optimizer), frozen, IMAGES, key)
    assert "parameters" in str(after) and len(str(after)) < 100
    views = views_of(key)

    def loss(params):
        logits = (encoder.logits(params, frozen, view) for view in views)
        return cib.cib_loss(fold_by_name(key, "code bits"), *logits)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(terms["loss"], value, rtol=1e-5)
    leaves = jax.tree.leaves(gradient)
    norm = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in leaves))
    np.testing.assert_allclose(terms["gradient_norm"], norm, rtol=1e-4)
    # The first moment after one step is 0.1 × the gradient of that step. The two programs round it differently, and
    # ties of the max pool go to other pixels.
    taken = jax.tree.map(lambda moment: np.asarray(moment, np.float64) / 0.1, after.opt_state[0].mu)
    for old, new, g, own in zip(*map(jax.tree.leaves, (params, after.params, taken, gradient)), strict=True):
        # The gradient of a bias before a normalization is nothing but rounding.
        assert np.linalg.norm(g - own) <= 0.05 * np.linalg.norm(own) + 1e-6
        np.testing.assert_allclose(new, np.asarray(old) - 1e-3 * g / (np.abs(g) + 1e-8), atol=2e-6)
    assert int(after.step) == 1


def test_weight_decay_sees_the_parameters():
    """With SGD and a learning rate of 1, decay by 0.25 takes another quarter of each parameter away."""
    features = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)
    standard = feature_augment.standard([features])
    encoder, params, _ = cib.create_encoder(jax.random.key(0), backbone="none", bits=8, hidden=4, standard=standard)
    after = []
    for optimizer in (optax.sgd(1.0), optax.chain(optax.add_decayed_weights(0.25), optax.sgd(1.0))):
        step = jax.jit(functools.partial(cib.train_step_on_features, encoder=encoder, optimizer=optimizer))
        state, _ = step(cib.create_train_state(params, optimizer), features, features + 0.1, jax.random.key(1))
        after.append(state.params)
    for start, plain, decayed in zip(*map(jax.tree.leaves, (params, *after)), strict=True):
        np.testing.assert_allclose(plain - decayed, 0.25 * start, rtol=1e-4, atol=1e-6)


def test_the_same_key_gives_the_same_bits_and_another_does_not(made):
    _, params, frozen, optimizer, step = made
    outcomes = [step(cib.create_train_state(params, optimizer), frozen, IMAGES, jax.random.key(k)) for k in (1, 1, 2)]
    first, again, other = (jax.tree.leaves(state.params) for state, _ in outcomes)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_donated_state_leaves_the_callers_parameters_alone(made):
    _, params, _, optimizer, _ = made
    before = jax.tree.map(np.array, params)
    state = cib.create_train_state(params, optimizer)
    jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, params)), strict=True))


def test_features_of_the_views_give_the_step_of_the_views(made, views_of):
    """With a frozen backbone, `train_step` and `train_step_on_features` are one step."""
    encoder, params, _, optimizer, _ = made
    frozen, params = {"backbone": params["backbone"]}, {"head": params["head"]}
    key = jax.random.key(9)
    features = jax.jit(lambda views: [encoder.features(params, frozen, view) for view in views])(views_of(key))
    options = {"encoder": encoder, "optimizer": optimizer, "beta": 0.1, "temperature": 0.5, "head_dropout": 0.25}
    state = cib.create_train_state(params, optimizer)
    whole, terms = jax.jit(functools.partial(cib.train_step, augment="digits", **options))(state, frozen, IMAGES, key)
    part, part_terms = jax.jit(functools.partial(cib.train_step_on_features, **options))(state, *features, key)
    np.testing.assert_allclose(terms["loss"], part_terms["loss"], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (whole.opt_state, part.opt_state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6)


FEATURES = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
PAIR = (FEATURES, FEATURES + 0.3)


def loss_of(encoder, params, key, *pair, **options):
    """Returns the loss of the head's logits, with the random numbers of a step."""

    def loss(params, *pair):
        logits = (encoder.head(params, features) for features in pair)
        return cib.cib_loss(fold_by_name(key, "code bits"), *logits, **options)[0]

    return jax.jit(loss)(params, *pair)


@pytest.fixture(scope="module")
def tiny():
    standard = feature_augment.standard([FEATURES])
    encoder, params, _ = cib.create_encoder(jax.random.key(0), backbone="none", bits=8, hidden=4, standard=standard)
    return encoder, params


@pytest.mark.parametrize(
    "field",
    [{"objective": "naive_cl"}, {"temperature": 0.7}, {"beta": 0.5}, {"stochastic": False}],
    ids=str,
)
def test_every_field_of_the_loss_reaches_it(tiny, field):
    encoder, params = tiny
    key, method = jax.random.key(1), {"encoder": encoder, "optimizer": optax.sgd(0.1)}
    state = cib.create_train_state(params, method["optimizer"])
    _, terms = jax.jit(functools.partial(cib.train_step_on_features, **method | field))(state, *PAIR, key)
    expected = loss_of(encoder, params, key, *PAIR, **field)
    assert float(terms["loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_dropout_reaches_the_heads_input_alone(tiny):
    encoder, params = tiny
    key, options = jax.random.key(1), {"encoder": encoder, "optimizer": optax.sgd(0.1)}
    state = cib.create_train_state(params, options["optimizer"])
    views = jnp.concatenate(PAIR)
    losses = []
    for rate in (0.5, 0.0):
        step = jax.jit(functools.partial(cib.train_step_on_features, head_dropout=rate, **options))
        _, terms = step(state, *PAIR, key)
        kept = train_step.drop_features(fold_by_name(key, "head dropout"), views, rate) if rate else views
        expected = loss_of(encoder, params, key, *jnp.split(kept, 2))
        assert float(terms["loss"]) == pytest.approx(float(expected), rel=1e-6)
        losses.append(float(terms["loss"]))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_has_its_rate_keeps_the_mean_and_differs_between_views(rate):
    """100,000 features of each of two views: shares of a binomial draw, within five standard deviations."""
    views = jnp.full((2 * 200, 500), 3.0)
    first, second = jnp.split(train_step.drop_features(jax.random.key(0), views, rate), 2)
    dropped = first == 0, second == 0
    for share, expected in (
        (jnp.mean(dropped[0]), rate),
        (jnp.mean(dropped[1]), rate),
        (jnp.mean(dropped[0] & dropped[1]), rate**2),
    ):
        assert abs(float(share) - expected) < 5 * np.sqrt(expected * (1 - expected) / 1e5)
    np.testing.assert_allclose(np.unique(first), [0.0, 3 / (1 - rate)], rtol=1e-6)
    assert float(jnp.mean(first)) == pytest.approx(3, rel=5 * np.sqrt(rate / (1 - rate) / 1e5))


def test_coordinates_and_their_sharpness_reach_the_loss(tiny):
    encoder, params = tiny
    key, options = jax.random.key(1), {"objective": "diffusion", "coordinates": jnp.eye(6), "sharpness": 2.0}
    state = cib.create_train_state(params, optax.sgd(0.1))
    method = {"encoder": encoder, "optimizer": optax.sgd(0.1)} | options
    _, terms = jax.jit(functools.partial(cib.train_step_on_features, **method))(state, *PAIR, key)
    expected = loss_of(encoder, params, key, *PAIR, **options)
    assert float(terms["loss"]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objective", "other"),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("sharpness", -1.0),
        ("beta", -0.1),
        ("micro_batch", -1),
        ("head_dropout", -0.1),
        ("head_dropout", 1.0),
        ("head_dropout", float("nan")),
    ],
)
def test_a_method_out_of_range_is_refused_with_its_field(tiny, field, value):
    with pytest.raises(ConfigError) as refused:
        Method(tiny[0], optax.sgd(0.1), **{field: value})
    assert refused.value.field == field


def test_a_temperature_may_follow_a_schedule(tiny):
    """A traced temperature has no value when the method is created."""
    encoder, params = tiny
    state = cib.create_train_state(params, optax.sgd(0.1))

    @jax.jit
    def loss(temperature):
        options = {"encoder": encoder, "optimizer": optax.sgd(0.1), "temperature": temperature}
        return cib.train_step_on_features(state, *PAIR, jax.random.key(0), **options)[1]["loss"]

    assert float(loss(0.1)) != float(loss(1.0))


def test_an_unknown_field_is_refused(tiny):
    with pytest.raises(TypeError, match="temprature"):
        cib.train_step(None, {}, FEATURES, jax.random.key(0), encoder=tiny[0], optimizer=None, temprature=1.0)


def test_the_old_name_of_the_optimizer_works(tiny):
    encoder, params = tiny
    state = cib.create_train_state(params, optax.sgd(0.1))
    for function, inputs in (
        (cib.train_step, ({}, FEATURES)),
        (cib.train_step_on_features, (FEATURES, FEATURES)),
    ):
        step = functools.partial(function, encoder=encoder, augment="noise")
        expected, _ = jax.jit(functools.partial(step, optimizer=optax.sgd(0.1)))(state, *inputs, jax.random.key(0))
        with pytest.warns(DeprecationWarning, match="optimiser is now optimizer"):
            after, _ = jax.jit(functools.partial(step, optimiser=optax.sgd(0.1)))(state, *inputs, jax.random.key(0))
        assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (expected, after)), strict=True))


def test_methods_with_equal_fields_are_one_static_argument(tiny):
    optimizer = optax.sgd(0.1)
    one, other = (Method(tiny[0], optimizer) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != dataclasses.replace(one, beta=0.5)


# The optimizer.

PARAMS = {
    "head": {"out": {"kernel": jnp.ones((3, 2))}},
    "backbone": {"blocks": {14: {"kernel": jnp.ones((2, 2))}}},
    "lora": {"blocks": {3: {"kernel": {"a": jnp.ones(4), "b": jnp.zeros(2)}}}},
}


def test_each_part_has_its_own_rate_in_the_first_step():
    """Adam's first step is rate · g / |g|, whatever the size of the gradient."""
    adam = train_step.adam(1e-2, 1e-4)
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, -3.0), PARAMS)
    updates, _ = adam.update(gradients, adam.init(PARAMS), PARAMS)
    for name, rate in (("head", 1e-2), ("backbone", 1e-4), ("lora", 1e-4)):
        for leaf in jax.tree.leaves(updates[name]):
            np.testing.assert_allclose(leaf, rate, rtol=1e-5)


@pytest.mark.parametrize("own", [0.0, 1e-3])
def test_one_rate_is_plain_adam_and_its_state(own):
    adam, plain = train_step.adam(1e-3, own), optax.adam(1e-3)
    assert jax.tree.structure(adam.init(PARAMS)) == jax.tree.structure(plain.init(PARAMS))
