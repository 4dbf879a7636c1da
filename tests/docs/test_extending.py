"""What docs/extending.md tells how to add works as it stands, and each of its parts is short."""

import jax
import numpy as np
import pytest
import scipy.special
import sklearn.decomposition
import sklearn.metrics.pairwise

import cib_jax as cib
from cib_jax import objective
from cib_jax.baselines import BASELINES
from cib_jax.data import images
from tests.docs import pages


def run(part: str) -> dict:
    """The names that a part's code leaves behind."""
    names: dict = {}
    for block in pages.code(pages.section("extending.md", part)):
        exec(compile(block, f"docs/extending.md, {part}", "exec"), names)
    return names


@pytest.mark.parametrize("part", ["A baseline", "An objective", "A backbone", "A data set"])
def test_a_part_is_under_forty_lines(part):
    assert len(pages.section("extending.md", part).strip().splitlines()) < 40


def test_the_baseline_turns_principal_components(monkeypatch):
    """Against scikit-learn's components: a rotation keeps their lengths and angles, and mixes all of them."""
    monkeypatch.setattr("cib_jax.baselines.BASELINES", rows := dict(BASELINES))
    run("A baseline")
    assert rows.keys() - BASELINES.keys() == {"pca_rotated"}
    features = np.random.default_rng(0).normal(size=(200, 24)) * np.linspace(1, 3, 24)
    encoder = rows["pca_rotated"].fit(features, 16, jax.random.key(0))
    logits = np.asarray(jax.jit(lambda encoder, x: encoder(x))(encoder, features.astype(np.float32)))
    components = sklearn.decomposition.PCA(16, svd_solver="full").fit_transform(features)
    np.testing.assert_allclose(logits @ logits.T, components @ components.T, atol=1e-3)
    # The variance of a bit is no longer that of its component.
    assert np.var(logits, axis=0).max() < np.var(components, axis=0).max()
    with pytest.raises(ValueError, match="the number of features"):
        rows["pca_rotated"].fit(features, 32, jax.random.key(0))


@pytest.fixture
def objectives(monkeypatch) -> dict:
    monkeypatch.setattr(objective, "OBJECTIVES", dict(objective.OBJECTIVES))
    return run("An objective")


def logits(batch: int = 5, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.random.default_rng(1).normal(size=(2, batch, bits)).astype(np.float32)
    return first, second


def test_a_row_makes_an_objective(objectives):
    """Its loss is the contrast of the logits themselves, by scikit-learn's cosines, and β times SciPy's KL."""
    first, second = logits()
    loss, terms = cib.cib_loss(jax.random.key(0), first, second, objective="bottleneck_cl", temperature=0.5, beta=0.1)
    similarity = sklearn.metrics.pairwise.cosine_similarity(np.concatenate([first, second])) / 0.5
    positive = similarity[np.arange(10), (np.arange(10) + 5) % 10]
    np.fill_diagonal(similarity, -np.inf)
    contrast = np.mean(scipy.special.logsumexp(similarity, axis=1) - positive)
    p, q = scipy.special.expit(first), scipy.special.expit(second)
    kl = sum(scipy.special.rel_entr(a, b).sum() for a, b in ((p, q), (1 - p, 1 - q), (q, p), (1 - q, 1 - p))) / 2 / 5
    np.testing.assert_allclose(terms["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(loss, contrast + 0.1 * kl, rtol=1e-5)


def test_a_term_is_added_and_reported(objectives):
    first, second = logits()
    plain, _ = cib.cib_loss(jax.random.key(0), first, second)
    loss, terms = objectives["balanced_loss"](jax.random.key(0), first, second, weight=2.0)
    means = scipy.special.expit(np.concatenate([first, second])).mean(axis=0)
    np.testing.assert_allclose(terms["balance"], np.mean((means - 0.5) ** 2), rtol=1e-5)
    np.testing.assert_allclose(loss, plain + 2 * terms["balance"], rtol=1e-6)
    assert terms["loss"] == loss
    # Half of the bits 1 and half 0, for every bit: nothing to balance.
    assert float(objectives["balance"](np.array([[3.0, -1.0], [-3.0, 1.0]]))) < 1e-12


def test_a_data_set_is_a_source():
    pixels = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
    source = run("A data set")["load"](pixels, np.array([0, 1, 0, 1, 0, 1]), ["even", "odd"])
    assert isinstance(source, images.Source)
    assert source.test is None
    np.testing.assert_array_equal(source.train.take(np.array([4, 1])).images[0], pixels[4])
