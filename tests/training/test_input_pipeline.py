"""The view bank: its rows are features of views, whatever the batches; pairs are of two views, drawn evenly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cib_jax as cib
from cib_jax import errors
from cib_jax.training import input_pipeline

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def encoder_and_frozen():
    encoder, params, _ = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=8, image_size=16)
    return encoder, {"backbone": params["backbone"]}


def build(encoder, frozen, size, views=3, **hooks):
    return input_pipeline.build_view_bank(
        jax.random.key(1),
        encoder,
        frozen,
        lambda first, stop: (IMAGES[start : min(start + size, stop)] for start in range(first, stop, size)),
        count=len(IMAGES),
        batch_size=size,
        views=views,
        family="digits",
        **hooks,
    )


def test_a_row_is_the_feature_of_one_view_of_its_image(encoder_and_frozen):
    encoder, frozen = encoder_and_frozen
    bank = build(encoder, frozen, 4)
    assert bank.shape == (3, 11, 256)
    for view, image in [(0, 0), (2, 10), (1, 5)]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), view), image)
        alone = encoder.view_each(key[None], jnp.asarray(IMAGES[image : image + 1]), family="digits")
        np.testing.assert_allclose(bank[view, image], encoder.features({}, frozen, alone)[0], rtol=6e-4, atol=1e-5)


def test_the_bank_does_not_depend_on_the_batch_size(encoder_and_frozen):
    encoder, frozen = encoder_and_frozen
    np.testing.assert_allclose(build(encoder, frozen, 4, 2), build(encoder, frozen, 11, 2), rtol=1e-3, atol=1e-5)


def test_views_that_were_kept_are_not_computed_again(encoder_and_frozen):
    encoder, frozen = encoder_and_frozen
    kept = {}
    bank = build(encoder, frozen, 4, 2, write=lambda view, rows: kept.__setitem__(view, rows.copy()))
    assert np.array_equal(np.stack([kept[0], kept[1]]), bank)
    kept[1][:] = 7  # told apart from what would be computed
    del kept[0]
    written = []
    again = build(encoder, frozen, 4, 2, read=kept.get, write=lambda view, rows: written.append(view))
    assert written == [0]
    assert np.array_equal(again[0], bank[0])
    assert np.all(again[1] == 7)


@pytest.mark.parametrize("scale", [1e6, np.nan])
def test_features_that_float16_cannot_hold_are_refused(encoder_and_frozen, scale):
    encoder, frozen = encoder_and_frozen
    with pytest.raises(errors.DataError, match=r"config.train.views: features of convnet .*65,504"):
        build(encoder, jax.tree.map(lambda array: array * scale, frozen), 11, 2)


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


def test_the_bank_and_fresh_views_agree_in_expectation(encoder_and_frozen):
    """The mean loss of a step over many draws is the same from a bank of many views as from fresh ones."""
    encoder, frozen = encoder_and_frozen
    head = cib.create_encoder(jax.random.key(3), backbone="convnet", bits=8, image_size=16)[1]["head"]
    draws = 300

    def loss(key, features1, features2):
        logits = (encoder.head({"head": head}, features) for features in (features1, features2))
        return cib.cib_loss(key, *logits, objective="naive_cl")[0]

    @jax.jit
    def fresh(key):
        views = encoder.two_views(key, jnp.asarray(IMAGES), family="digits")
        return loss(key, *(encoder.features({}, frozen, view) for view in views))

    @jax.jit
    def banked(key, bank):
        return loss(key, *input_pipeline.draw_pairs(key, bank, jnp.arange(len(IMAGES))))

    bank = build(encoder, frozen, 11, views=64)
    keys = jax.random.split(jax.random.key(7), draws)
    from_fresh = np.array([fresh(key) for key in keys], np.float64)
    from_bank = np.array([banked(key, bank) for key in keys], np.float64)
    error = np.sqrt(from_fresh.var() / draws + from_bank.var() / draws)
    assert abs(from_fresh.mean() - from_bank.mean()) < 4 * error
