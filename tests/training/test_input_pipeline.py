"""The view bank, pairs of views, and feeds: the same batches from the device and from the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cib_jax as cib
from cib_jax import errors
from cib_jax.augment.features import standard
from cib_jax.random_streams import fold_by_name
from cib_jax.training import input_pipeline
from cib_jax.training.input_pipeline import BatchOrder, ImageBatches
from cib_jax.training.train_step import Method

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def encoder_and_frozen():
    encoder, params, _ = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=8, image_size=8)
    return encoder, {"backbone": params["backbone"]}


class Kept(dict):
    """A store of views in memory, made in reverse order."""

    def in_turn(self, views):
        return reversed(range(views))

    def read(self, view):
        return self.get(view)

    def write(self, view, features):
        self[view] = features.copy()


def build(encoder, frozen, size, views=3, store=None):
    def read(first, stop):
        return (IMAGES[start : min(start + size, stop)] for start in range(first, stop, size))

    images = ImageBatches(read, len(IMAGES), size)
    return input_pipeline.build_view_bank(
        jax.random.key(1), encoder, frozen, images, views=views, family="digits", store=store
    )


def test_a_row_is_the_feature_of_one_view_of_its_image(encoder_and_frozen):
    encoder, frozen = encoder_and_frozen
    bank = build(encoder, frozen, 4)
    assert bank.shape == (3, 11, 256)

    @jax.jit
    def alone(key, images):
        return encoder.features({}, frozen, encoder.view_each(key, images, family="digits"))

    for view, image in [(0, 0), (2, 10), (1, 5)]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), view), image)
        expected = alone(key[None], IMAGES[image : image + 1])[0]
        np.testing.assert_allclose(bank[view, image], expected, rtol=6e-4, atol=1e-5)


def test_the_bank_does_not_depend_on_the_batch_size(encoder_and_frozen):
    encoder, frozen = encoder_and_frozen
    np.testing.assert_allclose(build(encoder, frozen, 4, 2), build(encoder, frozen, 11, 2), rtol=1e-3, atol=1e-5)


def test_views_that_were_kept_are_not_computed_again(encoder_and_frozen):
    encoder, frozen = encoder_and_frozen
    store = Kept()
    bank = build(encoder, frozen, 4, 2, store)
    assert np.array_equal(np.stack([store[0], store[1]]), bank)
    store[1][:] = 7  # unlike anything that is computed
    del store[0]
    again = build(encoder, frozen, 4, 2, store)
    assert np.array_equal(again[0], bank[0]) and np.array_equal(store[0], bank[0])
    assert np.all(again[1] == 7)


@pytest.mark.parametrize("scale", [1e6, np.nan])
def test_features_that_float16_cannot_hold_are_refused(encoder_and_frozen, scale):
    encoder, frozen = encoder_and_frozen
    with pytest.raises(errors.DataError, match="65,504") as refused:
        build(encoder, jax.tree.map(lambda array: array * scale, frozen), 11, 2)
    assert refused.value.field == "config.train.views"


def test_pairs_are_two_different_views_of_the_image_drawn_evenly():
    views, count, draws = 4, 3, 6000
    bank = jnp.arange(views * count, dtype=jnp.float32).reshape(views, count, 1)
    indices = jnp.tile(jnp.arange(count), draws // count)
    first, second = (
        np.asarray(x)[:, 0].astype(int) for x in input_pipeline.draw_pairs(jax.random.key(0), bank, indices)
    )
    assert np.array_equal(first % count, indices)
    assert np.array_equal(second % count, indices)
    pairs = np.zeros((views, views), int)
    np.add.at(pairs, (first // count, second // count), 1)
    assert np.all(np.diagonal(pairs) == 0)
    expected = draws / (views * (views - 1))
    off_diagonal = pairs[~np.eye(views, dtype=bool)]
    assert np.all(np.abs(off_diagonal - expected) < 5 * np.sqrt(expected))


@pytest.mark.slow
def test_the_bank_and_fresh_views_agree_in_expectation(encoder_and_frozen):
    """The mean loss of a step over many draws is the same from a bank of many views as from fresh ones.

    It follows from the tests above: a row is the feature of a fresh view, and pairs are drawn evenly.
    """
    encoder, frozen = encoder_and_frozen
    head = cib.create_encoder(jax.random.key(3), backbone="convnet", bits=8, image_size=8)[1]["head"]
    draws = 150

    def loss(key, features1, features2):
        logits = (encoder.head({"head": head}, features) for features in (features1, features2))
        return cib.cib_loss(key, *logits, objective="naive_cl")[0]

    @jax.jit
    def fresh(key):
        views = jnp.concatenate(encoder.two_views(key, jnp.asarray(IMAGES), family="digits"))
        return loss(key, *jnp.split(encoder.features({}, frozen, views), 2))

    @jax.jit
    def banked(key, bank):
        return loss(key, *input_pipeline.draw_pairs(key, bank, jnp.arange(len(IMAGES))))

    bank = build(encoder, frozen, 11, views=32)
    keys = jax.random.split(jax.random.key(7), draws)
    from_fresh = np.array([fresh(key) for key in keys], np.float64)
    from_bank = np.array([banked(key, bank) for key in keys], np.float64)
    error = np.sqrt(from_fresh.var() / draws + from_bank.var() / draws)
    assert abs(from_fresh.mean() - from_bank.mean()) < 4 * error


# Feeds.


@pytest.fixture(scope="module")
def steps_of_feeds(compiled_to_run, encoder_and_frozen):
    """Two steps from the device and from a stream: their terms, and the parameters afterwards."""
    encoder, frozen = encoder_and_frozen
    head = cib.create_encoder(jax.random.key(3), backbone="convnet", bits=8, image_size=8, hidden=1024)[1]["head"]
    optimizer = optax.sgd(0.1)
    method = Method(encoder, optimizer, augment="digits")
    order = BatchOrder(3, 4)
    found = {}
    for name, feed in (
        ("device", input_pipeline.from_device(jnp.asarray(IMAGES), frozen, method, order)),
        ("stream", input_pipeline.from_stream(IMAGES, frozen, method, order)),
    ):
        state, terms = cib.create_train_state({"head": head}, optimizer), []
        for number, chunk in enumerate(feed.epoch_chunks(0, 0)):
            state, step_terms = feed.steps(state, chunk, number, jax.random.key(5))
            terms.append({name: float(value[0]) for name, value in step_terms.items()})
        found[name] = terms, jax.tree.leaves(state.params)
    return found


def test_streamed_images_make_the_steps_of_resident_ones(steps_of_feeds):
    (terms, params), (other_terms, other_params) = steps_of_feeds["device"], steps_of_feeds["stream"]
    assert len(terms) == len(other_terms) == 2
    for mine, theirs in zip(terms, other_terms, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    for mine, theirs in zip(params, other_params, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-7)


def test_an_epoch_is_every_image_once_but_for_what_fills_no_batch():
    bank = jnp.zeros((2, 11, 3))
    encoder, _, _ = cib.create_encoder(
        jax.random.key(0), backbone="none", bits=8, standard=standard([np.ones((2, 3), np.float32)])
    )
    feed = input_pipeline.from_bank(bank, Method(encoder, optax.sgd(0.1)), BatchOrder(1, 4))
    orders = [np.concatenate(list(feed.epoch_chunks(epoch, 0))) for epoch in (0, 1)]
    assert [order.shape for order in orders] == [(2, 4)] * 2
    assert all(len(set(order.ravel())) == 8 for order in orders)
    assert not np.array_equal(*orders)
    rest = np.concatenate(list(feed.epoch_chunks(0, 1)))
    assert np.array_equal(rest, orders[0][1:])  # resumed after the first step


@pytest.fixture
def traced():
    """SGD that notes each time its update is traced, and an encoder of features."""
    standardized = standard([np.ones((2, 3), np.float32)])
    encoder, params, _ = cib.create_encoder(jax.random.key(0), backbone="none", bits=8, hidden=4, standard=standardized)
    plain, traces = optax.sgd(0.1), []

    def update(updates, state, params=None):
        traces.append(1)
        return plain.update(updates, state, params)

    return encoder, params, optax.GradientTransformation(plain.init, update), traces


def first_step(traced, **fields):
    """Returns the terms of the first step on a bank, and those of `train_step_on_features` on the same pairs."""
    encoder, params, optimizer, _ = traced
    bank = jax.random.normal(jax.random.key(2), (3, 8, 3))
    feed = input_pipeline.from_bank(bank, Method(encoder, optimizer, **fields), BatchOrder(1, 4))
    (chunk,) = feed.epoch_chunks(0, 0)
    _, terms = feed.steps(cib.create_train_state(params, optimizer), chunk, 0, jax.random.key(5))
    key = jax.random.fold_in(jax.random.key(5), 0)
    pairs = jax.jit(input_pipeline.draw_pairs)(fold_by_name(key, "view pairs"), bank, chunk[0])
    options = {"encoder": encoder, "optimizer": optax.sgd(0.1)} | fields
    step = jax.jit(functools.partial(cib.train_step_on_features, **options))
    _, alone = step(cib.create_train_state(params, optax.sgd(0.1)), *pairs, key)
    return {name: float(terms[name][0]) for name in alone}, {name: float(value) for name, value in alone.items()}


def test_methods_that_differ_in_numbers_share_one_program(traced):
    fields = [{}, {"temperature": 0.7, "beta": 0.5, "sharpness": 2.0}]
    found = [first_step(traced, **each) for each in fields]
    assert len({terms["loss"] for terms, _ in found}) == len(fields)
    for terms, alone in found:
        assert terms == pytest.approx(alone, rel=1e-5)
    traces = len(traced[3])
    assert first_step(traced, stochastic=False)[0] != found[0][0]
    assert len(traced[3]) == 2 * traces, "one program for the numbers, and another one for another choice"


def test_a_loss_of_ones_own_is_compiled_anew_for_each_feed(traced):
    """It takes Python numbers, and may read what has changed."""
    weight = 1.0

    def loss(key, logits1, logits2, *, temperature):
        assert isinstance(temperature, float)
        return weight * jnp.mean((logits1 - logits2) ** 2), {}

    once, _ = first_step(traced, objective=loss)
    weight = 3.0
    assert first_step(traced, objective=loss)[0]["loss"] == pytest.approx(3 * once["loss"])
