"""LSH, PCA sign and ITQ against closed forms, scikit-learn, SciPy and FAISS; eigenvectors against rotations of them."""

import pathlib

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import sklearn.decomposition

from cib_jax.baselines import itq, linear, lsh, pca_sign
from cib_jax.errors import Refusal

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "baselines.npz"


@pytest.fixture(scope="module")
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


def test_principal_axes_are_eigenvectors_of_scipys_with_their_variances(features):
    found = linear.principal_axes(features, 12)
    values, vectors = scipy.linalg.eigh(np.cov(features.astype(np.float64), rowvar=False, bias=True))
    np.testing.assert_allclose(found.variance, values[::-1], rtol=1e-6)
    np.testing.assert_allclose(np.abs(np.sum(found.axes * vectors[:, ::-1], axis=0)), 1, atol=1e-9)
    np.testing.assert_allclose(found.project(features).var(axis=0), values[::-1], rtol=1e-6)
    assert np.all(found.axes[np.abs(found.axes).argmax(axis=0), range(12)] > 0)


def test_more_features_than_items_give_the_same_axes():
    wide = np.random.default_rng(2).normal(size=(30, 200)).astype(np.float32)
    found = linear.principal_axes(wide, 64)
    values, vectors = scipy.linalg.eigh(np.cov(wide.astype(np.float64), rowvar=False, bias=True))
    np.testing.assert_allclose(np.abs(np.sum(found.axes * vectors[:, :-65:-1], axis=0))[:29], 1, atol=1e-6)
    np.testing.assert_allclose(found.variance[:29], values[:-30:-1], rtol=1e-6)
    # 30 centered items have rank 29; axes beyond carry nothing.
    assert found.axes.shape == (200, 64) and not found.axes[:, 29:].any() and not found.variance[29:].any()


def test_axes_without_variance_give_constant_bits(features):
    """A copied and a constant feature leave two axes of variance 0; an arbitrary axis would give rounding errors."""
    redundant = np.concatenate([features, features[:, :1], np.full((400, 1), 0.1, np.float32)], axis=1)
    logits = np.asarray(pca_sign.fit(redundant, 14, jax.random.key(0))(redundant))
    assert np.all(logits[:, 12:] == 0) and np.all(logits[:, :12].std(axis=0) > 0.01)
    assert not np.asarray(pca_sign.fit(np.ones((9, 3)), 2, jax.random.key(0))(np.ones((9, 3)))).any()


def test_features_too_large_to_decompose_are_refused():
    side = linear.MAX_SIDE + 1
    with pytest.raises(Refusal, match="features"):
        linear.principal_axes(np.broadcast_to(np.float32(0), (side, side)), 2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("with_criterion", [False, True])
def test_canonical_eigenvectors_do_not_depend_on_the_solvers_basis(seed, with_criterion):
    """Any rotation within an eigenspace, and any signs, give the same vectors; they are still eigenvectors."""
    values = np.array([5.0, 5, 5, 3, 2, 2, 0, 0])
    vectors = scipy.stats.ortho_group.rvs(8, random_state=seed)
    # The criterion distinguishes the vectors of the second eigenspace, and only two of the three of the first.
    criterion = vectors @ np.diag([1.0, 4, 4, 0, 2, 7, 0, 0]) @ vectors.T if with_criterion else None
    rotation = scipy.linalg.block_diag(
        *(scipy.stats.ortho_group.rvs(size, random_state=seed + size) if size > 1 else [[-1]] for size in (3, 1, 2, 2))
    )
    found = linear.canonical_eigenvectors(values, vectors, scale=5.0, criterion=criterion)
    rotated = values + 1e-13 * np.random.default_rng(seed).normal(size=8)
    order = np.argsort(-rotated)
    other = linear.canonical_eigenvectors(
        rotated[order], (vectors @ rotation)[:, order], scale=5.0, criterion=criterion
    )
    np.testing.assert_allclose(other, found, atol=1e-9)
    np.testing.assert_allclose(found.T @ found, np.eye(8), atol=1e-12)
    np.testing.assert_allclose((vectors * values) @ vectors.T @ found, found * values, atol=1e-11)
    if with_criterion:
        # In descending order of the criterion: of the first eigenspace, the third vector is the one with 1.
        np.testing.assert_allclose(np.abs(vectors[:, [0, 5, 4]].T @ found[:, [2, 4, 5]]), np.eye(3), atol=1e-9)


def test_signs_of_vectors_with_several_largest_components():
    pairs = np.array([[1.0, 1], [-1, 1]]) / 2**0.5
    for noise in (1e-15, -1e-15):
        found = linear.canonical_eigenvectors(np.array([2.0, 1]), -pairs + noise * np.eye(2), scale=2.0)
        np.testing.assert_allclose(found, pairs, atol=1e-12)


def test_itq_is_scipys_procrustes_in_turns_and_no_worse_than_faiss():
    golden = np.load(GOLDEN)
    projected, expected = golden["projected"].astype(np.float64), golden["start"]
    for _ in range(50):
        expected = scipy.linalg.orthogonal_procrustes(projected, np.sign(projected @ expected))[0]
    found = linear.itq_rotation(projected, golden["start"], 50)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    rotated = projected @ found
    assert np.square(np.sign(rotated) - rotated).sum() <= golden["faiss_itq_loss"]


def test_itq_lowers_its_loss_at_every_iteration():
    golden = np.load(GOLDEN)
    losses = []
    for iterations in range(8):
        rotated = golden["projected"] @ linear.itq_rotation(golden["projected"], golden["start"], iterations)
        losses.append(np.square(np.sign(rotated) - rotated).sum())
    assert np.all(np.diff(losses) < 1e-9)


def test_itq_keeps_its_rotation_where_codes_do_not_determine_it():
    """Points on a line determine one row of the rotation, and Procrustes leaves the others open."""
    line = np.outer(np.linspace(-1, 1, 8), [1.0, 0, 0])
    start = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    found = linear.itq_rotation(line, start, 5)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.abs(found[0]), 3**-0.5, atol=1e-9)
    # The others stay as near as possible to where they started, by SciPy.
    complement = scipy.linalg.null_space(found[:1])
    nearest = scipy.linalg.orthogonal_procrustes(np.eye(2), start[1:] @ complement)[0] @ complement.T
    np.testing.assert_allclose(found[1:], nearest, atol=1e-3)


def test_itq_rotates_pca_without_stretching(features):
    key = jax.random.key(3)
    rotated = np.asarray(itq.fit(features, 6, key)(features))
    plain = np.asarray(pca_sign.fit(features, 6, key)(features))
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), np.linalg.norm(plain, axis=1), rtol=1e-3)
    assert np.abs(rotated - plain).max() > 1


@pytest.mark.parametrize("method", [pca_sign, itq], ids=["pca_sign", "itq"])
def test_more_bits_than_features_are_refused(method, features):
    with pytest.raises(Refusal, match=r"^bits .*12"):
        method.fit(features, 16, jax.random.key(0))
