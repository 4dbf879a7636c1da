"""Diffusion on neighbor graphs against scikit-learn's neighbors and dense powers of the walk in float64."""

import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse
import sklearn.metrics.pairwise
import sklearn.neighbors

import cib_jax as cib
from cib_jax import diffusion
from cib_jax.errors import ConfigError, UserError


def draw(items, features=5, seed=0):
    return np.random.default_rng(seed).standard_normal((items, features)).astype(np.float32)


def coordinates(embeddings, **fields):
    teacher = cib.Teacher(**fields)
    return teacher.coordinates(*teacher.neighbors(embeddings))


@pytest.mark.parametrize("block", [7, 512])
def test_neighbors_are_those_of_scikit_learn(monkeypatch, block):
    monkeypatch.setattr(diffusion, "BLOCK", block)
    embeddings, counts = draw(60), []
    found, cosines = diffusion.nearest_neighbors(embeddings, 4, on_items=counts.append)
    expected = sklearn.neighbors.NearestNeighbors(n_neighbors=5, metric="cosine").fit(embeddings)
    distances, places = expected.kneighbors(embeddings)
    assert [set(row) for row in found] == [set(row[1:]) for row in places]
    np.testing.assert_allclose(np.sort(1 - cosines), np.sort(distances[:, 1:]), atol=1e-6)
    assert sum(counts) == 60


def test_most_of_the_approximate_neighbors_are_exact_and_the_same_twice():
    """In 16 dimensions, which is no easier than real features, where 96% are found."""
    embeddings = draw(3000, 16) @ draw(16, 40, seed=1)
    exact, _ = diffusion.nearest_neighbors(embeddings, 15)
    counts = []
    found, cosines = diffusion.nearest_neighbors(embeddings, 15, exact_items=2999, on_items=counts.append)
    common = [len(set(one) & set(other)) for one, other in zip(exact, found, strict=True)]
    assert np.mean(common) / 15 >= 0.95
    assert not (found == np.arange(3000)[:, None]).any()
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines, np.einsum("rf,rnf->rn", unit, unit[found]), atol=1e-5)
    assert sum(counts) == 3000
    again = diffusion.nearest_neighbors(embeddings, 15, exact_items=2999)
    assert np.array_equal(found, again[0])
    assert np.array_equal(cosines, again[1])


def test_items_with_few_candidates_and_copies_have_all_their_neighbors():
    """More copies of an item than candidates, and clusters of FAISS that are smaller than the number of neighbors."""
    embeddings = np.concatenate([draw(300, 6), np.repeat(draw(1, 6, seed=1), 100, axis=0)])
    found, cosines = diffusion.nearest_neighbors(embeddings, 90, exact_items=1)
    assert all(len(set(row)) == 90 for row in found)
    assert not (found == np.arange(400)[:, None]).any()
    assert np.isfinite(cosines).all()
    np.testing.assert_allclose(cosines[300:], 1, atol=1e-5)


def test_too_many_items_without_faiss_name_the_extra(monkeypatch):
    diffusion.validate_item_count(diffusion.EXACT_ITEMS)
    monkeypatch.setitem(sys.modules, "faiss", None)
    diffusion.validate_item_count(diffusion.EXACT_ITEMS)
    with pytest.raises(ConfigError, match=r"\[search\]") as refused:
        diffusion.validate_item_count(diffusion.EXACT_ITEMS + 1)
    assert refused.value.field == "objective"
    with pytest.raises(ConfigError):
        diffusion.nearest_neighbors(draw(20), 3, exact_items=19)


def test_a_fit_on_too_many_items_without_faiss_is_refused_before_the_teacher_trains(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"\[search\]"):
        cib.fit(np.ones((diffusion.EXACT_ITEMS + 1, 2), np.float16), bits=8, objective="diffusion")


def walk_of(embeddings, neighbours):
    """Returns the walk's probabilities, item by item, and its stationary distribution."""
    unit = embeddings.astype(np.float64) / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = unit @ unit.T
    linked, distances = np.zeros(cosines.shape, bool), np.maximum(1 - cosines, 0)
    for item in range(len(unit)):
        others = [other for other in np.argsort(-cosines[item]) if other != item][:neighbours]
        for other in others:
            linked[item, other] = linked[other, item] = True
    scale = np.sort(distances, axis=1)[:, min(7, neighbours)]  # the first is the item's distance to itself
    weights = np.where(linked, np.maximum(np.exp(-(distances**2) / np.outer(scale, scale)), 1e-6), 0)
    return weights / weights.sum(axis=1, keepdims=True), weights.sum(axis=1) / weights.sum()


@pytest.mark.parametrize(("groups", "neighbours"), [(1, 8), (3, 8), (1, 399)])
def test_modes_of_many_items_are_those_of_lapack(groups, neighbours):
    """Groups that no walk leaves, of each a mode of the eigenvalue 1; and a graph of all pairs, with few slow modes."""
    sides = 50 * np.eye(5, dtype=np.float32)[np.arange(400) * groups // 400]
    walk, often = walk_of(sides + draw(400), neighbours)
    root = np.sqrt(often)
    symmetric = root[:, None] * walk / root
    matrix = scipy.sparse.csr_matrix(symmetric)
    values, modes = diffusion.slowest_modes(matrix, root, 100, steps=12, dense_items=0)
    expected, vectors = (part[..., ::-1][..., :100] for part in np.linalg.eigh(symmetric))
    np.testing.assert_allclose(values**12, expected**12, atol=1e-3)
    np.testing.assert_allclose(modes.T @ modes, np.eye(100), atol=1e-5)
    np.testing.assert_allclose((modes * values**12) @ modes.T, (vectors * expected**12) @ vectors.T, atol=2e-3)


def test_inner_products_are_the_odds_of_a_walk_of_that_many_steps():
    """All modes but the last, of which 12 steps leave nothing that shows."""
    embeddings = draw(40)
    points = coordinates(embeddings, neighbours=6, dimensions=39, steps=12)
    walk, often = walk_of(embeddings, 6)
    # An even number of steps: `coordinates` leaves out modes that turn their sign with every step.
    values, modes = np.linalg.eigh(np.sqrt(often)[:, None] * walk / np.sqrt(often))
    kept = modes[:, values > 0] * values[values > 0] ** 6 / np.sqrt(often)[:, None]
    np.testing.assert_allclose(points @ points.T, kept @ kept.T, atol=2e-3)
    dense = np.linalg.matrix_power(walk, 12) / often
    np.testing.assert_allclose(points @ points.T, dense, atol=0.05)


def test_what_no_walk_links_has_no_odds_and_the_rest_has_its_share():
    """Two groups that share no neighbor, a long walk: 1 over its group's share within it, 0 between them."""
    sides = np.repeat([[9.0, 0, 0, 0, 0], [0, 9.0, 0, 0, 0]], [30, 20], axis=0).astype(np.float32)
    embeddings = sides + draw(50)
    points = coordinates(embeddings, neighbours=8, dimensions=4, steps=400)
    odds = points @ points.T
    _, often = walk_of(embeddings, 8)
    for group in (slice(0, 30), slice(30, 50)):
        np.testing.assert_allclose(odds[group, group], 1 / often[group].sum(), rtol=2e-3)
    np.testing.assert_allclose(odds[:30, 30:], 0, atol=1e-4)


def test_many_small_groups_leave_half_of_the_dimensions_to_the_rest():
    """Eleven groups of four copies and two halves of a cloud that is in one piece, six dimensions."""
    halves = np.repeat([[3.0, 0, 0, 0, 0], [0, 3.0, 0, 0, 0]], [40, 40], axis=0).astype(np.float32)
    copies = np.repeat(10 * draw(11, 5, 3), 4, axis=0) * np.float32([0, 0, 1, 1, 1])
    embeddings = np.concatenate([halves + draw(80), copies])
    points = coordinates(embeddings, neighbours=3, dimensions=6, steps=2)
    odds = points[:80] @ points[:80].T
    assert odds[:40, :40].mean() > odds[:40, 40:].mean() + 0.5
    assert odds[40:, 40:].mean() > odds[:40, 40:].mean() + 0.5


def test_the_same_embeddings_give_the_same_bits():
    one, other = (coordinates(draw(80), neighbours=5, dimensions=10) for _ in range(2))
    assert one.dtype == np.float32
    assert np.array_equal(one, other)


@hypothesis.given(
    items=st.integers(4, 40), copies=st.integers(1, 8), neighbours=st.integers(1, 3), seed=st.integers(0, 99)
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_copies_and_opposites_leave_everything_finite(items, copies, neighbours, seed):
    some = draw(items, 3, seed)
    embeddings = np.concatenate([some, -some, np.repeat(some[:1], copies, axis=0)])
    points = coordinates(embeddings, neighbours=neighbours, dimensions=3)
    assert points.shape == (len(embeddings), 3)
    assert np.isfinite(points).all()


@pytest.mark.parametrize("items", [3, 7, 16])
def test_few_items_have_fewer_neighbors_and_dimensions(items):
    points = coordinates(draw(items))
    assert points.shape == (items, items - 1)
    expected = coordinates(draw(items), neighbours=min(15, items - 1), dimensions=items - 1)
    assert np.array_equal(points, expected)


def test_links_compare_a_distance_with_those_of_the_neighborhood():
    """A dense and a sparse group, alike but for their scale, give the same odds within themselves."""
    directions = draw(40, 8) * np.float32([0, *[1] * 7])
    groups = [np.float32([10, *[0] * 7]) + 0.1 * directions, np.float32([-10, *[0] * 7]) + directions]
    points = coordinates(np.concatenate(groups), neighbours=9, dimensions=60, steps=8)
    dense, sparse = points[:40] @ points[:40].T, points[40:] @ points[40:].T
    np.testing.assert_allclose(dense, sparse, rtol=0.1, atol=0.1)


def test_joined_embeddings_have_the_mean_of_both_cosines():
    logits, features = draw(9, 4), draw(9, 6, seed=1)
    cosines = sklearn.metrics.pairwise.cosine_similarity
    joined = diffusion.join_features(9, [(logits[:4], features[:4]), (logits[4:], features[4:])])
    np.testing.assert_allclose(
        cosines(joined), (cosines(logits) + cosines(features - features.mean(axis=0))) / 2, atol=1e-6
    )


@pytest.mark.parametrize(
    ("embeddings", "options", "field"),
    [
        (draw(2), {"neighbours": 1, "dimensions": 2}, "embeddings"),
        (draw(9), {"neighbours": 0, "dimensions": 3}, "teacher.neighbours"),
        (draw(9), {"neighbours": 3, "dimensions": 1}, "teacher.dimensions"),
        (draw(9), {"neighbours": 3, "dimensions": 3, "steps": 0}, "teacher.steps"),
        (np.zeros((9, 2), np.float32), {"neighbours": 3, "dimensions": 3}, "embeddings"),
        (np.full((9, 2), np.nan, np.float32), {"neighbours": 3, "dimensions": 3}, "embeddings"),
    ],
)
def test_embeddings_without_a_graph_are_refused(embeddings, options, field):
    with pytest.raises(UserError) as refused:
        coordinates(embeddings, **options)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "diffusion"},
        {"bits": 0},
        {"temperature": 0.0},
        {"epochs": -1},
        {"neighbours": 0},
        {"dimensions": 1},
        {"steps": 0},
    ],
    ids=str,
)
def test_a_teacher_out_of_range_is_refused(fields):
    with pytest.raises(UserError) as refused:
        diffusion.Teacher(**fields)
    assert refused.value.field == f"teacher.{next(iter(fields))}"


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (2, (2, 60, 60)),
        (63, (63, 60, 60)),
        (3_219, (64, 60, 60)),
        (10_000, (64, 25, 50)),
        (50_000, (128, 10, 20)),
        (1_000_000, (512, 2, 4)),
        (100_000_000, (4096, 1, 1)),
    ],
)
def test_batches_and_epochs_follow_from_the_number_of_images(images, expected):
    assert diffusion.batches_and_epochs(images) == expected
    assert diffusion.batches_and_epochs(images, epochs=3) == (expected[0], 3, 3)
    assert diffusion.batches_and_epochs(50_000, batch_size=64) == (64, 5, 10)
