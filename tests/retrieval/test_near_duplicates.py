"""Groups of near-duplicates against SciPy's connected components of all pairs."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csgraph

from cib_jax.retrieval import near_duplicates
from tests.retrieval.reference import clustered_codes, distances_of, random_codes, tied_codes


def check_groups(codes, radius):
    labels = csgraph.connected_components(distances_of(codes, codes) <= radius, directed=False)[1]
    expected = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    done: list[int] = []
    found = [members.tolist() for members in near_duplicates.groups(codes, radius, done.append)]
    assert min(done, default=0) >= 0 and sum(done) <= len(codes)
    assert found == sorted(members for members in expected if len(members) > 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tied_codes(), st.integers(0, 80))
def test_groups_are_the_components_of_all_pairs(monkeypatch, pair, radius):
    """In blocks of a few pairs."""
    monkeypatch.setattr(near_duplicates, "BLOCK_BYTES", 64)
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 5)
    check_groups(pair[1], min(radius, 8 * pair[1].shape[1]))


@pytest.mark.parametrize(("width", "radius"), [(2, 1), (4, 2), (8, 0), (8, 3), (8, 9), (20, 5), (512, 40)])
def test_groups_match_scipy(width, radius):
    """The bits of 2 and 8 bytes fall into pieces that do not end with a byte; 9 of 64 compares all pairs."""
    codes = np.concatenate([clustered_codes(150, width, centers=30), random_codes(150, width, 1)])
    check_groups(codes, radius)


def test_a_chain_is_one_group():
    """Each code one bit from the next, the ends as far apart as codes can be."""
    codes = np.packbits(np.tri(65, 64, -1, dtype=np.uint8), axis=1)
    (members,) = near_duplicates.groups(codes[::-1].copy(), 1)
    assert members.tolist() == list(range(65))
    assert near_duplicates.groups(codes[::2].copy(), 1) == []


def test_many_equal_codes_are_one_group():
    (members,) = near_duplicates.groups(np.zeros((50_000, 3), np.uint8), 0)
    np.testing.assert_array_equal(members, np.arange(50_000))
