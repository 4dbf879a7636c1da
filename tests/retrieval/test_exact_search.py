"""Exact search against SciPy's distances and Python's stable sort."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cib_jax as cib
from cib_jax.retrieval import exact_search
from tests.retrieval.reference import clustered_codes, distances_of, tied_codes

# The fixture sets constants, the same for every example.
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def nearest_by_sorting(queries, codes, k):
    distances = distances_of(queries, codes)
    order = [sorted(range(len(codes)), key=lambda i, row=row: (row[i], i))[:k] for row in distances]
    return np.take_along_axis(distances, np.array(order), 1), order


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few codes, so that a small database goes through every stage of a large one."""
    sizes = {"FIRST": 4, "BLOCK_BYTES": 64, "ROWS": 2, "TASK": 8, "COUNTED_BYTES": 7, "BUFFERED_HITS": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(exact_search, name, size)


@pytest.mark.usefixtures("small_blocks")
@relaxed
@given(tied_codes())
def test_exact_search_is_a_stable_sort(pair):
    queries, codes, k = pair
    distances, ids = exact_search.nearest(codes, queries, k)
    expected = nearest_by_sorting(queries, codes, k)
    np.testing.assert_array_equal(distances, expected[0])
    np.testing.assert_array_equal(ids, expected[1])
    assert (distances.dtype, ids.dtype) == (np.int32, np.int64)


@pytest.mark.usefixtures("small_blocks")
@relaxed
@given(tied_codes(), st.integers(0, 300))
def test_within_finds_all_in_order(pair, radius):
    queries, codes, _ = pair
    found = exact_search.within(codes, queries, radius)
    assert len(found) == len(queries)
    for hits, row in zip(found, distances_of(queries, codes), strict=True):
        expected = sorted((row[i], i) for i in range(len(codes)) if row[i] <= radius)
        assert list(zip(hits.distances, hits.ids, strict=True)) == expected


@pytest.mark.usefixtures("small_blocks")
def test_a_bar_advances_by_every_query():
    codes, done = clustered_codes(100, 2), []
    exact_search.nearest(codes, clustered_codes(45, 2, 1), 3, done.append)
    exact_search.within(codes, clustered_codes(45, 2, 1), 3, done.append)
    assert sum(done) == 90 and max(done) <= 23  # several calls


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", [1, 3, 4, 5, 17, 33, 200])
def test_one_query_is_shared_by_all_cores(n, monkeypatch):
    monkeypatch.setattr(exact_search, "core_count", lambda: 7)
    codes = clustered_codes(n, 2)
    for k in {1, min(n, 9), n}:
        _, ids = exact_search.nearest(codes, codes[:1], k)
        np.testing.assert_array_equal(ids, nearest_by_sorting(codes[:1], codes, k)[1])
    (hits,) = exact_search.within(codes, codes[:1], 3)
    np.testing.assert_array_equal(np.sort(hits.ids), np.flatnonzero(distances_of(codes[:1], codes)[0] <= 3))


@pytest.mark.parametrize("width", [1, 2, 8, 20, 64, 512])
def test_exact_search_is_the_rank_of_the_protocol(width):
    codes, queries = clustered_codes(40_000 if width < 64 else 20_000, width), clustered_codes(5, width, 1)
    for k in (1, 20, 5000):
        distances, ids = exact_search.nearest(codes, queries, k)
        np.testing.assert_array_equal(ids, cib.rank(queries, codes, k))
        expected = np.bitwise_count(queries[:, None] ^ codes[ids]).sum(-1)
        np.testing.assert_array_equal(distances, expected)


def test_equal_codes_come_in_database_order():
    codes = np.zeros((50_000, 3), np.uint8)
    distances, ids = exact_search.nearest(codes, codes[:3], 30_000)
    np.testing.assert_array_equal(ids, np.tile(np.arange(30_000), (3, 1)))
    assert not distances.any()


def test_calls_return_in_order_from_any_thread_and_raise_their_errors():
    results = {}

    def use(name):
        results[name] = exact_search.run_in_order([lambda number=number: number * name for number in range(20)])

    threads = [threading.Thread(target=use, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [number * name for number in range(20)] for name in range(4)}
    with pytest.raises(ZeroDivisionError):
        exact_search.run_in_order([lambda: 1, lambda: 1 / 0])
