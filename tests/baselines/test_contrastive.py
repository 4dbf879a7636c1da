"""The losses of baselines that learn from views against plain loops in NumPy and SciPy."""

import jax
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats

from cib_jax.baselines import contrastive
from cib_jax.errors import UserError


def test_each_view_predicts_the_bits_of_the_other():
    """The loss in float64: cross-entropies by SciPy's log of the sigmoid, and coding rates by determinants."""
    first, second = np.random.default_rng(10).normal(size=(2, 9, 6))
    expected = 0.0
    for logits, bits in ((first, second > 0), (second, first > 0)):
        chance = scipy.special.log_expit(np.where(bits, logits, -logits))
        rows = logits / np.linalg.norm(logits, axis=1, keepdims=True)
        rate = np.linalg.slogdet(np.eye(6) + 6 / (9 * 0.05) * rows.T @ rows).logabsdet / 2 * (6 + 9) / (6 * 9)
        expected += (-chance.mean() - 0.1 * rate) / 2
    assert float(jax.jit(contrastive.alignment_loss)(first, second)) == pytest.approx(expected, rel=1e-4)


def test_similarity_is_refined_pair_by_pair():
    """Signs and weights in float64, by SciPy's normal distribution."""
    generator = np.random.default_rng(12)
    rows, labels = generator.normal(size=(14, 3)), generator.integers(0, 3, size=14)
    distances = scipy.spatial.distance.cdist(rows, rows, "cosine")
    left, right = scipy.stats.norm(1.0, 0.4).cdf, scipy.stats.norm(1.0, 0.3).cdf
    signs, weights = np.zeros((2, 14, 14))
    for i in range(14):
        for j in range(14):
            d, one_cluster = distances[i, j], labels[i] == labels[j]
            signs[i, j] = 1 if d <= 0.8 else -1
            if d <= 0.8 and one_cluster:
                weights[i, j] = (left(0.8) - left(d)) / left(0.8)
            if d > 0.8 and not one_cluster:
                weights[i, j] = (right(d) - right(0.8)) / (1 - right(0.8))
    assert 14 < np.sum(weights > 0) < 150
    refine = jax.jit(contrastive.refined_similarity, static_argnums=(2, 3))
    found = refine(rows, labels, (1.0, 0.4, 0.3), 0.5)
    np.testing.assert_array_equal(found.signs, signs)
    np.testing.assert_allclose(found.weights, weights, atol=1e-5)


def test_codes_of_both_views_are_consistent_with_both_similarities():
    generator = np.random.default_rng(13)
    logits = generator.normal(size=(2, 6, 8))
    signs, weights = np.sign(generator.normal(size=(2, 6, 6))), generator.uniform(size=(2, 6, 6))
    expected, codes = 0.0, np.tanh(logits)
    for guide in range(2):
        for view in range(2):
            for i in range(6):
                for j in range(6):
                    error = signs[guide, i, j] - codes[view, i] @ codes[view, j] / 8
                    expected += weights[guide, i, j] * error**2 / 36
    both = np.concatenate(codes)
    similarities = (1 - scipy.spatial.distance.cdist(both, both, "cosine")) / 0.5
    for i in range(12):
        others = np.delete(similarities[i], i)
        expected += 0.3 * (scipy.special.logsumexp(others) - similarities[i, (i + 6) % 12]) / 12
    guidance = [contrastive.Guidance(*pair) for pair in zip(signs, weights, strict=True)]
    assert float(jax.jit(contrastive.consistency_loss)(*logits, guidance)) == pytest.approx(expected, rel=1e-4)


def test_spectral_clusters_are_those_of_separate_directions():
    labels = np.arange(60) % 3
    rows = np.eye(5)[labels] + 0.05 * np.random.default_rng(14).normal(size=(60, 5))
    found = contrastive.spectral_clusters(rows, 3, jax.random.key(0))
    assert len({*zip(labels.tolist(), found.tolist(), strict=True)}) == 3 == len({*found.tolist()})


def test_more_rows_than_spectral_clustering_can_take_are_refused():
    with pytest.raises(UserError) as refused:
        contrastive.spectral_clusters(np.zeros((20_000, 1), np.float32), 3, jax.random.key(0))
    assert refused.value.field == "features"


def an_overview_step(generator, batch=6, width=5, hidden=7, bits=8, wide=4, length=10):
    """Parameters, memory and two views, in float32."""
    shapes = {"encode 1": (width, hidden), "encode 2": (hidden, bits), "values": (hidden, wide)}

    def draw(*shape):
        return generator.normal(size=shape).astype(np.float32)

    networks = [
        {name: draw(*shape) for name, shape in shapes.items()}
        | {f"{name} bias": draw(shape[1]) for name, shape in shapes.items()}
        for _ in range(2)
    ]
    memory = contrastive.Memory(networks[1], draw(length, wide), draw(length, bits), draw(length, wide))
    return networks[0], memory, draw(batch, width), draw(batch, width)


def length_one(row):
    return row / np.linalg.norm(row)


def plain_heads(params, row):
    middle = np.maximum(row @ params["encode 1"] + params["encode 1 bias"], 0)
    bits = (middle @ params["encode 2"] + params["encode 2 bias"] > 0).astype(np.float64)
    return bits, length_one(middle @ params["values"] + params["values bias"])


def plain_overview(heads, bits, values):
    own_bits, own_values = heads
    equal = [sum(a * b + (1 - a) * (1 - b) for a, b in zip(own_bits, other, strict=True)) for other in bits]
    average = scipy.special.softmax(np.array(equal) / (len(own_bits) * 0.2)) @ values
    return length_one(length_one(average) + 0.5 * own_values)


def plain_overview_loss(params, memory, rows1, rows2):
    """The loss, overview by overview, in float64, and the next memory."""
    encoder = {name: 0.999 * array + 0.001 * params[name] for name, array in memory.encoder.items()}
    slow = [plain_heads(encoder, row) for row in rows2]
    targets = [plain_overview(heads, memory.bits, memory.values) for heads in slow]
    after = contrastive.Memory(
        encoder,
        np.array(targets + list(memory.overviews))[: len(memory.overviews)],
        np.array([heads[0] for heads in slow] + list(memory.bits))[: len(memory.bits)],
        np.array([heads[1] for heads in slow] + list(memory.values))[: len(memory.values)],
    )
    others = [plain_overview(plain_heads(params, row), after.bits, after.values) for row in rows2]
    return plain_entropies(params, memory, rows1, targets, others), after


def plain_entropies(params, memory, rows, targets, others):
    """The cross-entropies of first views' overviews, whose counterparts are given."""
    loss = 0.0
    for number, row in enumerate(rows):
        found = plain_overview(plain_heads(params, row), memory.bits, memory.values)
        for right, wrong in ((targets[number], memory.overviews), (others[number], np.delete(others, number, axis=0))):
            likeness = np.array([found @ right, *(found @ other for other in wrong)]) / 0.2
            loss += (scipy.special.logsumexp(likeness) - likeness[0]) / len(rows)
    return loss


def test_overviews_find_those_of_the_other_view():
    step = an_overview_step(np.random.default_rng(15))
    expected, after = plain_overview_loss(*step)
    found, memory = jax.jit(contrastive.overview_loss)(*step)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5), memory, after)


def test_only_the_first_views_overview_is_learned():
    """The loss is smooth in the weights of the values, so that differences of the plain loss give the gradient.

    In these, the overviews of the second view keep the old weights.
    """
    params, memory, rows1, rows2 = an_overview_step(np.random.default_rng(16))
    gradient = jax.jit(jax.grad(lambda *step: contrastive.overview_loss(*step)[0]))(params, memory, rows1, rows2)
    assert any(np.abs(gradient["encode 2"]).ravel() > 1e-4)  # bits learn, too, by the sigmoid's gradient
    old = {name: array.astype(np.float64) for name, array in params.items()}
    _, after = plain_overview_loss(old, memory, rows1, rows2)
    others = [plain_overview(plain_heads(old, row), after.bits, after.values) for row in rows2]
    targets = after.overviews[: len(rows2)]

    def loss(values):
        return plain_entropies(old | {"values": values}, memory, rows1, targets, others)

    for place in np.ndindex(2, 4):
        ahead, behind = old["values"].copy(), old["values"].copy()
        ahead[place] += 1e-5
        behind[place] -= 1e-5
        slope = (loss(ahead) - loss(behind)) / 2e-5
        assert gradient["values"][place] == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_bits_have_the_gradient_of_the_sigmoid():
    params, _, rows, _ = an_overview_step(np.random.default_rng(17))
    middle = np.maximum(rows @ params["encode 1"] + params["encode 1 bias"], 0)
    chances = scipy.special.expit(middle @ params["encode 2"] + params["encode 2 bias"])

    def sum_of_bits(bias):
        given = jax.tree.map(jax.numpy.asarray, params) | {"encode 2 bias": bias}
        return contrastive.bits_and_values(given, jax.numpy.asarray(rows))[0].sum()

    found = jax.jit(jax.grad(sum_of_bits))(params["encode 2 bias"])
    np.testing.assert_allclose(found, (chances * (1 - chances)).sum(axis=0), rtol=1e-4)
