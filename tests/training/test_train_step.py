"""The step against Adam written out by hand, and its promises: determinism, donation, frozen parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cib_jax as cib

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def made():
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0), backbone="convnet", bits=16, image_size=16, hidden=32
    )
    optimizer = optax.adam(1e-3)
    step = jax.jit(functools.partial(cib.train_step, encoder=encoder, optimizer=optimizer, augment="digits"))
    return encoder, params, frozen, optimizer, step


def test_a_step_is_adams_first(made):
    """Adam's first step is learning rate × g / (|g| + ε), whatever the gradient's size."""
    encoder, params, frozen, optimizer, step = made
    key = jax.random.key(5)
    after, terms = step(cib.create_train_state(params, optimizer), frozen, IMAGES, key)
    view_key, code_key = jax.random.split(key)
    views = encoder.two_views(view_key, jnp.asarray(IMAGES), family="digits")

    def loss(params):
        return cib.cib_loss(code_key, *(encoder.logits(params, frozen, view) for view in views))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(terms["loss"], value, rtol=1e-5)
    leaves = jax.tree.leaves(gradient)
    norm = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in leaves))
    np.testing.assert_allclose(terms["gradient_norm"], norm, rtol=1e-4)
    # The first moment after one step is 0.1 × the gradient the step took; the two programs round it
    # differently, and ties of the max pool go to other pixels.
    taken = jax.tree.map(lambda moment: np.asarray(moment, np.float64) / 0.1, after.opt_state[0].mu)
    for old, new, g, own in zip(*map(jax.tree.leaves, (params, after.params, taken, gradient)), strict=True):
        # A bias before a standardisation has no gradient but rounding.
        assert np.linalg.norm(g - own) <= 0.05 * np.linalg.norm(own) + 1e-6
        np.testing.assert_allclose(new, np.asarray(old) - 1e-3 * g / (np.abs(g) + 1e-8), atol=2e-6)
    assert int(after.step) == 1


def test_the_same_key_gives_the_same_bits_and_another_does_not(made):
    _, params, frozen, optimizer, step = made
    outcomes = [step(cib.create_train_state(params, optimizer), frozen, IMAGES, jax.random.key(k)) for k in (1, 1, 2)]
    first, again, other = (jax.tree.leaves(state.params) for state, _ in outcomes)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_donated_state_leaves_the_callers_parameters_alone(made):
    encoder, params, frozen, optimizer, _ = made
    before = jax.tree.map(np.array, params)
    step = jax.jit(
        functools.partial(cib.train_step, encoder=encoder, optimizer=optimizer, augment="digits"), donate_argnums=0
    )
    step(cib.create_train_state(params, optimizer), frozen, IMAGES, jax.random.key(0))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, params)), strict=True))


def test_features_of_the_views_give_the_step_of_the_views(made):
    """With a frozen backbone, `train_step` and `train_step_on_features` are one step."""
    encoder, params, _, optimizer, _ = made
    frozen, params = {"backbone": params["backbone"]}, {"head": params["head"]}
    key = jax.random.key(9)
    views = encoder.two_views(jax.random.split(key)[0], jnp.asarray(IMAGES), family="digits")
    features = [encoder.features(params, frozen, view) for view in views]
    options = {"encoder": encoder, "optimizer": optimizer, "beta": 0.1, "temperature": 0.5}
    state = cib.create_train_state(params, optimizer)
    whole, terms = jax.jit(functools.partial(cib.train_step, augment="digits", **options))(state, frozen, IMAGES, key)
    part, part_terms = jax.jit(functools.partial(cib.train_step_on_features, **options))(state, *features, key)
    np.testing.assert_allclose(terms["loss"], part_terms["loss"], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (whole.opt_state, part.opt_state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6)
