"""Curves against plain loops over the definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cib_jax.retrieval import code_quality, metrics
from tests.retrieval.reference import reference_ball, reference_map, reference_precision, reference_recall, tied_data


@given(tied_data(), st.data())
def test_curves_match_their_definitions(data, draw):
    k = draw.draw(st.integers(1, len(data[1])))
    found = metrics.curves(*data, k)
    assert found.k == sorted({k, *(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if s <= k)})
    for place, at in enumerate(found.k):
        assert found.map[place] == pytest.approx(reference_map(data, at), abs=1e-12)
        assert found.precision[place] == pytest.approx(reference_precision(data, at), abs=1e-12)
        assert found.recall[place] == pytest.approx(reference_recall(data, at), abs=1e-12)
    for radius, (precision, empty) in enumerate(zip(found.radius_precision, found.radius_empty, strict=True)):
        expected = reference_ball(data, radius)
        assert (precision, empty) == pytest.approx((expected[0], expected[2]), abs=1e-12)
    assert found.average_precision.mean() == pytest.approx(found.map[-1], abs=1e-12)


@given(tied_data())
def test_distances_of_pairs_are_counted_one_by_one(data):
    found = metrics.curves(*data, 1)
    bits = data[0].shape[1] * 8
    counts = np.zeros((2, bits + 1))
    answerable = []
    for query, label in zip(data[0], data[2], strict=True):
        distances = np.unpackbits(query ^ data[1], axis=1).sum(axis=1)
        relevant = (data[3] == label) if data[3].ndim == 1 else (data[3].astype(bool) & label.astype(bool)).any(axis=1)
        for distance, hit in zip(distances, relevant, strict=True):
            counts[int(hit), distance] += 1
        answerable.append(relevant.any())
    for mine, theirs in ((found.relevant, counts[1]), (found.irrelevant, counts[0])):
        np.testing.assert_allclose(mine, theirs / max(theirs.sum(), 1), atol=1e-12)
    assert found.answerable.tolist() == answerable


def test_correlation_of_bits_is_numpys_and_unknown_for_a_constant_bit():
    packed = np.random.default_rng(0).integers(0, 256, (200, 2), np.uint8) & np.uint8(0b11111110)
    bits = np.unpackbits(packed, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.corrcoef(bits.T)
    np.testing.assert_allclose(code_quality.bit_correlation(packed), expected, atol=1e-12)
    assert np.isnan(code_quality.bit_correlation(packed)[7]).all()


def test_occupancy_counts_items_of_each_code():
    packed = np.array([[1], [2], [1], [3], [1], [3]], np.uint8)
    assert code_quality.occupancy(packed).tolist() == [3, 2, 1]
    assert metrics.mean_average_precision(packed, packed, packed[:, 0].astype(int), packed[:, 0].astype(int), 1) == 1
