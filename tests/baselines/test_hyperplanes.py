"""LSH, PCA sign and ITQ against closed forms, scikit-learn, SciPy and FAISS."""

import pathlib

import jax
import numpy as np
import pytest
import scipy.linalg
import sklearn.decomposition

from cib_jax.baselines import itq, lsh, pca_sign, principal

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "baselines.npz"


@pytest.fixture
def features():
    generator = np.random.default_rng(1)
    return (generator.normal(size=(400, 12)) @ generator.normal(size=(12, 12)) + 50).astype(np.float32)


def test_lsh_bits_differ_with_probability_of_the_angle():
    """Charikar's closed form: θ/π, seen from the mean."""
    angle = np.pi / 5
    around = np.stack([np.cos([0, np.pi, angle, angle + np.pi]), np.sin([0, np.pi, angle, angle + np.pi])], axis=1)
    bits = np.asarray(lsh.fit(around + 7, 20_000, jax.random.key(0))(around + 7)) > 0
    assert (bits[0] != bits[2]).mean() == pytest.approx(angle / np.pi, abs=4 * (0.2 * 0.8 / 20_000) ** 0.5)
    assert (bits[0] != bits[1]).mean() > 0.999


def test_pca_sign_is_scikit_learns(features):
    theirs = sklearn.decomposition.PCA(5, svd_solver="full").fit_transform(features.astype(np.float64))
    mine = np.asarray(pca_sign.fit(features, 5, jax.random.key(0))(features))
    np.testing.assert_allclose(np.abs(mine), np.abs(theirs), atol=2e-3)


def test_principal_axes_keep_a_convention_of_sign_and_their_variances(features):
    found = principal.axes(features, 12)
    assert np.all(found.axes[np.abs(found.axes).argmax(axis=0), range(12)] > 0)
    theirs = sklearn.decomposition.PCA(12).fit(features.astype(np.float64)).explained_variance_ * 399 / 400
    np.testing.assert_allclose(found.variance, theirs, rtol=1e-6)


def test_principal_axes_do_not_depend_on_the_blocks(features, monkeypatch):
    whole = principal.axes(features, 4)
    monkeypatch.setattr(principal, "BLOCK", 37)
    parts = principal.axes(features, 4)
    np.testing.assert_allclose(parts.axes, whole.axes, atol=1e-9)
    np.testing.assert_allclose(parts.project(features), whole.project(features), atol=1e-7)


def test_more_features_than_items_give_the_same_axes(features):
    """By the smaller matrix of products of items; against scikit-learn, which decomposes the features themselves."""
    wide = np.random.default_rng(2).normal(size=(30, 200)).astype(np.float32)
    found = principal.axes(wide, 10)
    theirs = sklearn.decomposition.PCA(10, svd_solver="full").fit(wide.astype(np.float64))
    np.testing.assert_allclose(np.abs(np.sum(found.axes * theirs.components_.T, axis=0)), 1, atol=1e-6)
    np.testing.assert_allclose(found.variance, theirs.explained_variance_ * 29 / 30, rtol=1e-6)
    every = principal.axes(wide, 64)  # more than the rank: the last ones carry nothing
    assert every.axes.shape == (200, 64) and np.isfinite(every.axes).all() and np.all(every.variance[30:] == 0)


def test_what_is_too_large_to_decompose_is_refused(monkeypatch, features):
    monkeypatch.setattr(principal, "MOST", 10)
    with pytest.raises(ValueError, match="12 features of 400 items are too many for principal axes"):
        principal.axes(features, 2)


def test_itq_is_scipys_procrustes_in_turns_and_no_worse_than_faiss():
    golden = np.load(GOLDEN)
    projected, expected = golden["projected"].astype(np.float64), golden["start"]
    for _ in range(50):
        expected = scipy.linalg.orthogonal_procrustes(projected, np.sign(projected @ expected))[0]
    found = itq.rotation(projected, golden["start"], 50)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    turned = projected @ found
    assert np.square(np.sign(turned) - turned).sum() <= golden["faiss_itq_loss"]


def test_itq_lowers_its_loss_at_every_iteration():
    golden = np.load(GOLDEN)
    losses = []
    for iterations in range(8):
        turned = golden["projected"] @ itq.rotation(golden["projected"], golden["start"], iterations)
        losses.append(np.square(np.sign(turned) - turned).sum())
    assert np.all(np.diff(losses) < 1e-9)


def test_itq_turns_pca_without_stretching(features):
    key = jax.random.key(3)
    turned = np.asarray(itq.fit(features, 6, key)(features))
    plain = np.asarray(pca_sign.fit(features, 6, key)(features))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(plain, axis=1), rtol=1e-3)
    assert np.abs(turned - plain).max() > 1


@pytest.mark.parametrize("method", [pca_sign, itq])
def test_more_bits_than_features_are_refused(method, features):
    with pytest.raises(ValueError, match="bits: 16 is more than 12"):
        method.fit(features, 16, jax.random.key(0))
