"""Distances, ranking and counting against SciPy, stable sorts and plain loops."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import cdist

from cib_jax.errors import UserError
from cib_jax.retrieval import hamming
from cib_jax.retrieval.hamming import Relevance


def differing_bits(a, b):
    return sum(bin(int(x) ^ int(y)).count("1") for x, y in zip(a, b, strict=True))


def ranks_by_sorting(queries, database, k):
    """Python's stable sort by distance of the database, one query at a time."""
    return [
        sorted(range(len(database)), key=lambda i, q=query: differing_bits(q, database[i]))[:k] for query in queries
    ]


@st.composite
def code_pairs(draw, widths=(1, 2, 3, 5, 8, 9, 17)):
    """Queries and a database of one width, from few byte values, so that ties abound."""
    width = draw(st.sampled_from(widths))
    byte = st.sampled_from([0, 1, 3, 255])
    queries = draw(hnp.arrays(np.uint8, (draw(st.integers(1, 4)), width), elements=byte))
    database = draw(hnp.arrays(np.uint8, (draw(st.integers(1, 30)), width), elements=byte))
    return queries, database


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8, 12, 31, 32, 512])
def test_distances_match_scipy(width):
    rng = np.random.default_rng(width)
    queries = rng.integers(0, 256, (5, width), dtype=np.uint8)
    database = rng.integers(0, 256, (40, width), dtype=np.uint8)
    expected = cdist(np.unpackbits(queries, axis=1), np.unpackbits(database, axis=1), "cityblock")
    distances = hamming.hamming_distances(queries, database)
    assert distances.dtype == np.uint16
    np.testing.assert_array_equal(distances, expected)


@pytest.mark.parametrize("width", [31, 32, 512])
def test_the_largest_distance_does_not_wrap(width):
    """248 bits fit a byte, 256 and 4,096 do not."""
    zeros, ones = np.zeros((1, width), np.uint8), np.full((1, width), 255, np.uint8)
    assert hamming.hamming_distances(zeros, ones) == [[8 * width]]
    np.testing.assert_array_equal(hamming.rank(zeros, np.concatenate([ones, zeros, ones]), 3), [[1, 0, 2]])


@pytest.mark.parametrize("width", [1, 4, 9, 31, 32])
def test_the_product_of_accelerators_gives_the_counts_of_cpus(width):
    rng = np.random.default_rng(width)
    queries, database = (
        jnp.asarray(hamming.as_words(rng.integers(0, 256, (n, width), dtype=np.uint8))) for n in (3, 20)
    )
    counted = hamming.by_counting(queries, database, np.uint16)
    np.testing.assert_array_equal(hamming.by_product(queries, database), counted)


@pytest.mark.parametrize(("platform", "form"), [("cpu", "popcnt"), ("cuda", "dot_general"), ("tpu", "dot_general")])
def test_an_accelerator_multiplies_and_a_cpu_counts(platform, form):
    """In the program as it is lowered for each, which needs none of them."""
    words = jax.ShapeDtypeStruct((2, 8), jnp.uint32)
    text = hamming.hamming.trace(words, words, 8).lower(lowering_platforms=(platform,)).as_text()
    assert [name for name in ("popcnt", "dot_general") if f".{name} " in text] == [form]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_ranking_and_counting_lower_for_accelerators(platform):
    found, relevance = (jax.ShapeDtypeStruct((4, 64), dtype) for dtype in (jnp.uint8, jnp.bool_))
    hamming.nearest_jax.trace(found, 10).lower(lowering_platforms=(platform,))
    hamming.histograms_jax.trace(found, relevance, 9).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(("width", "dtype"), [(28, np.uint8), (29, np.uint16), (8191, np.uint16)])
def test_padding_is_farther_than_any_code(width, dtype):
    """Against the complement, where every bit differs; a code of 29 bytes fills eight words."""
    codes = np.zeros((1, width), np.uint8)
    found = np.asarray(hamming.hamming(hamming.as_words(codes), hamming.as_words(~codes, 8), 1))
    assert found.dtype == dtype
    assert found.tolist() == [[8 * width] + [np.iinfo(dtype).max] * 7]


@pytest.mark.parametrize(("most", "queries"), [(1, 5), (4, 5), (4, 8), (64, 5)])
def test_blocks_of_any_height_come_in_order(monkeypatch, most, queries):
    monkeypatch.setattr(hamming, "MAX_QUERIES", most)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (queries, 3), dtype=np.uint8)
    database = rng.integers(0, 256, (20, 3), dtype=np.uint8)
    expected = cdist(np.unpackbits(codes, axis=1), np.unpackbits(database, axis=1), "cityblock")
    np.testing.assert_array_equal(hamming.hamming_distances(codes, database), expected)
    rows = list(hamming.over_blocks(codes, database, lambda rows, found: (rows.start, rows.stop)))
    assert [start for start, _ in rows] == [0, *(stop for _, stop in rows[:-1])]
    assert rows[-1][1] == queries


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_an_error_in_one_block_is_raised_and_ends_the_others(monkeypatch, error):
    monkeypatch.setattr(hamming, "MAX_QUERIES", 1)
    codes, done, threads = np.zeros((200, 1), np.uint8), [], threading.active_count()

    def work(rows, found):
        done.append(rows.start)
        if rows.start == 3:
            raise error

    with pytest.raises(error):
        list(hamming.over_blocks(codes, codes, work))
    assert len(done) < 100
    assert threading.active_count() == threads


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 65_536, 100_000, 3_000_000])
def test_filling_up_a_database_costs_little_and_knows_few_sizes(size):
    padded = hamming.padded_size(size)
    assert size <= padded <= max(2 * 4096, size * 9 / 8)
    assert padded % 8 == 0
    near = {hamming.padded_size(other) for other in range(size, size + size // 8, max(1, size // 999))}
    assert len(near) <= 3


def test_a_database_larger_than_a_block_matches_scipy():
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 256, (3, 2), dtype=np.uint8)
    database = rng.integers(0, 256, (70_003, 2), dtype=np.uint8)
    expected = cdist(np.unpackbits(queries, axis=1), np.unpackbits(database, axis=1), "cityblock")
    np.testing.assert_array_equal(hamming.hamming_distances(queries, database), expected)
    ranks = np.argsort(expected, axis=1, kind="stable")[:, :999]
    np.testing.assert_array_equal(hamming.rank(queries, database, 999), ranks)


def test_distances_of_a_strided_view():
    """Every other byte of every third row: nothing may rely on contiguous memory."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (30, 16), dtype=np.uint8)[::3, ::2]
    expected = [[differing_bits(a, b) for b in codes] for a in codes]
    np.testing.assert_array_equal(hamming.hamming_distances(codes, codes), expected)


@given(code_pairs(), st.data())
def test_rank_matches_a_stable_sort(pair, data):
    queries, database = pair
    k = data.draw(st.integers(1, len(database)))
    ranks = hamming.rank(queries, database, k)
    assert ranks.dtype == np.int32
    np.testing.assert_array_equal(ranks, ranks_by_sorting(queries, database, k))


@pytest.mark.parametrize("k", [1, 6, 50])
def test_rank_of_identical_codes_is_database_order(k):
    codes = np.full((50, 8), 170, np.uint8)
    np.testing.assert_array_equal(hamming.rank(codes[:2], codes, k), [np.arange(k)] * 2)


def test_rank_of_4096_bits_matches_a_stable_sort():
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 256, (2, 512), dtype=np.uint8)
    database = rng.integers(0, 256, (60, 512), dtype=np.uint8)
    np.testing.assert_array_equal(hamming.rank(queries, database, 60), ranks_by_sorting(queries, database, 60))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("near", [0, 1, 2, 3])
@pytest.mark.parametrize("k", [1, 3000, 6000, 20_000])
def test_nearest_whatever_the_sample_says(dtype, near, k):
    """Every fourth image is near or far: where those are the sample, it promises too many or too few."""
    found = np.random.default_rng(0).integers(5, 60, (2, 20_000)).astype(dtype)
    found[:, near::4] %= 5
    found[1] = found[1, ::-1]
    expected = [sorted(range(20_000), key=row.tolist().__getitem__)[:k] for row in found]
    np.testing.assert_array_equal(hamming.nearest_numpy(found, 20_000, k), expected)
    far = 200 - found
    np.testing.assert_array_equal(hamming.nearest_numpy(far, 20_000, 1)[:, 0], np.argmin(far, axis=1))


@given(hnp.arrays(np.uint8, st.integers(1, 60), elements=st.integers(0, 9)), st.data())
def test_kth_distance_matches_sorting(row, data):
    k = data.draw(st.integers(1, len(row)))
    assert hamming.kth_distance(row, k) == sorted(row.tolist())[k - 1]


@given(hnp.arrays(np.bool_, st.integers(1, 9).map(lambda n: 8 * n)))
def test_true_positions_match_flatnonzero(mask):
    np.testing.assert_array_equal(hamming.true_positions(mask), np.flatnonzero(mask))


@given(
    hnp.arrays(np.uint8, (3, 40), elements=st.integers(0, 16)),
    hnp.arrays(np.bool_, (3, 40)),
    st.sampled_from([(1, 1), (7, 1), (7, 7), (33, 7), (40, 1), (40, 40)]),
    st.sampled_from([np.uint8, np.uint16]),
)
def test_host_and_device_rank_and_count_as_a_loop_does(found, relevance, size_and_k, dtype):
    """Padding, from `size` on, is neither ranked nor counted."""
    (size, k), radii = size_and_k, 17
    found = found.astype(dtype)
    found[:, size:] = np.iinfo(dtype).max
    expected = [sorted(range(size), key=row.tolist().__getitem__)[:k] for row in found]
    np.testing.assert_array_equal(hamming.nearest_numpy(found, size, k), expected)
    np.testing.assert_array_equal(hamming.nearest_jax(found, k), expected)
    counts = np.zeros((3, 2, radii), int)
    for query, position in np.ndindex(3, size):
        counts[query, int(relevance[query, position]), found[query, position]] += 1
    np.testing.assert_array_equal(hamming.histograms_numpy(found[:, :size], relevance[:, :size], radii), counts)
    np.testing.assert_array_equal(hamming.histograms_jax(found, relevance, radii), counts)


@given(
    st.sampled_from([1, 11, 80]).flatmap(lambda classes: hnp.arrays(np.bool_, (7, classes))),
    st.integers(1, 6),
)
def test_relevance_of_sets_and_of_classes_matches_python(labels, queries):
    sets = [set(np.flatnonzero(row).tolist()) for row in labels]
    numbers = labels.sum(axis=1) - 3
    for values, shares in (
        (labels, lambda a, b: bool(sets[a] & sets[b])),
        (numbers, lambda a, b: numbers[a] == numbers[b]),
    ):
        expected = [[shares(a, b) for b in range(queries, 7)] for a in range(queries)]
        relevance = Relevance(values[:queries], values[queries:])
        ranks = np.tile(np.arange(7 - queries), (queries, 1))
        np.testing.assert_array_equal(relevance.ranked(slice(0, queries), ranks), expected)
        whole = np.asarray(relevance.matrix(slice(0, queries), 8))
        np.testing.assert_array_equal(whole[:queries, : 7 - queries], expected)
        assert not whole[:queries, 7 - queries :].any()


CODES = np.zeros((3, 2), np.uint8)


@pytest.mark.parametrize(
    ("queries", "database", "field"),
    [
        (CODES.astype(np.int64), CODES, "queries"),
        (CODES, CODES[0], "database"),
        (CODES[:0], CODES, "queries"),
        (CODES, CODES[:, :0], "database"),
        (CODES, np.zeros((4, 3), np.uint8), "queries"),
        (np.zeros((1, 8192), np.uint8), CODES, "queries"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_malformed_codes_are_refused(queries, database, field):
    for function in (hamming.hamming_distances, lambda queries, database: hamming.rank(queries, database, 1)):
        with pytest.raises(UserError) as refused:
            function(queries, database)
        assert refused.value.field == field


@pytest.mark.parametrize("k", [0, -1, 4])
def test_a_k_outside_the_database_is_refused(k):
    with pytest.raises(UserError) as refused:
        hamming.rank(CODES, CODES, k)
    assert refused.value.field == "k"
