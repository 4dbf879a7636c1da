"""Views of features: standardization against scikit-learn, noise and dropout against closed forms, even draws."""

import hypothesis
import jax
import numpy as np
import pytest
import scipy.stats
import sklearn.preprocessing
from hypothesis import strategies as st

from cib_jax.augment import features as features_lib
from cib_jax.augment.features import Standard
from cib_jax.errors import UserError


@hypothesis.given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 10**6))
@hypothesis.settings(max_examples=40, deadline=None)
def test_mean_and_deviation_by_blocks_are_those_of_the_whole(lengths, features, offset):
    generator = np.random.default_rng(sum(lengths))
    blocks = [generator.normal(offset, 2.0, (length, features)) for length in [*lengths, 2]]
    scaler = sklearn.preprocessing.StandardScaler().fit(np.concatenate(blocks))
    made = features_lib.standard(blocks)
    np.testing.assert_allclose(made.mean, scaler.mean_, rtol=1e-6)
    # A deviation that vanishes beside the mean counts as none.
    expected = np.where(scaler.scale_ <= 1e-6 * np.abs(scaler.mean_), 1, scaler.scale_)
    np.testing.assert_allclose(made.deviation, expected, rtol=1e-5)


def test_constant_features_are_left_at_zero_and_views_count_as_rows():
    rows = np.random.default_rng(0).normal(size=(50, 3, 4)).astype(np.float16)
    rows[..., 2] = 7
    made = features_lib.standard([rows[:20], rows[20:]])
    flat = rows.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(made.mean, flat.mean(0), rtol=1e-5, atol=1e-7)
    assert made.deviation[2] == 1
    plain = features_lib.plain(rows, *made)
    assert np.all(plain[:, 2] == 0)
    np.testing.assert_allclose(plain[:, 0], (rows[:, 0, 0] - flat.mean(0)[0]) / flat.std(0)[0], rtol=1e-4, atol=1e-4)


def test_it_survives_json_exactly():
    made = Standard(*np.random.default_rng(0).normal(size=(2, 30)).astype(np.float32))
    again = Standard.from_lists(made.to_lists())
    assert np.array_equal(again.mean, made.mean) and np.array_equal(again.deviation, made.deviation)
    assert again.mean.dtype == np.float32


def views(features, family="noise", noise=0.0, dropout=0.0, seed=0):
    nothing = (0.0,) * features.shape[-1], (1.0,) * features.shape[-1]
    made = features_lib.two_views(jax.random.key(seed), features, *nothing, family=family, noise=noise, dropout=dropout)
    return [np.asarray(view) for view in made]


def test_noise_has_the_deviation_asked_for_and_differs_between_views():
    one, other = views(np.full((400, 50), 3.0, np.float32), noise=0.5)
    for view in (one, other):
        assert scipy.stats.kstest((view - 3).ravel(), scipy.stats.norm(scale=0.5).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.03


def test_dropout_leaves_features_out_at_its_rate_and_keeps_the_average():
    one, other = views(np.full((400, 50), 3.0, np.float32), dropout=0.25)
    for view in (one, other):
        assert set(np.round(np.unique(view), 5)) == {0.0, 4.0}
        assert scipy.stats.binomtest(int((view == 0).sum()), view.size, 0.25).pvalue > 1e-3
    assert scipy.stats.chi2_contingency(np.histogram2d(one.ravel(), other.ravel(), 2)[0]).pvalue > 1e-3


def test_without_noise_and_dropout_a_view_is_the_item():
    features = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    for view in views(features):
        np.testing.assert_allclose(view, features, rtol=1e-6)


def test_two_different_stored_views_are_drawn_evenly():
    features = np.broadcast_to(np.arange(4, dtype=np.float16)[:, None], (3000, 4, 2))
    one, other = (view[:, 0].astype(int) for view in views(features, family="stored"))
    counts = np.zeros((4, 4), int)
    np.add.at(counts, (one, other), 1)
    assert np.all(np.diag(counts) == 0)
    assert scipy.stats.chisquare(counts[~np.eye(4, dtype=bool)]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("shape", "family", "field"),
    [((5, 3), "photo", "family"), ((5, 3), "stored", "features"), ((5, 1, 3), "stored", "features")],
)
def test_families_that_do_not_fit_the_features_are_rejected(shape, family, field):
    with pytest.raises(UserError) as error:
        views(np.zeros(shape, np.float32), family=family)
    assert error.value.field == field


def test_blocks_without_rows_are_rejected():
    with pytest.raises(UserError) as error:
        features_lib.standard([np.zeros((0, 3))])
    assert error.value.field == "blocks"
