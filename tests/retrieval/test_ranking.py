import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import cdist

from cib_jax.retrieval import ranking


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
    distances = ranking.hamming_distances(queries, database)
    assert distances.dtype == np.uint16
    np.testing.assert_array_equal(distances, expected)


@pytest.mark.parametrize("width", [31, 32, 512])
def test_the_largest_distance_does_not_wrap(width):
    """248 bits fit a byte, 256 and 4,096 do not."""
    zeros, ones = np.zeros((1, width), np.uint8), np.full((1, width), 255, np.uint8)
    assert ranking.hamming_distances(zeros, ones) == [[8 * width]]
    np.testing.assert_array_equal(ranking.rank(zeros, np.concatenate([ones, zeros, ones]), 3), [[1, 0, 2]])


def test_distances_across_chunks_match_scipy(monkeypatch):
    monkeypatch.setattr(ranking, "_CHUNK", 7)
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 256, (3, 10), dtype=np.uint8)
    database = rng.integers(0, 256, (20, 10), dtype=np.uint8)
    expected = cdist(np.unpackbits(queries, axis=1), np.unpackbits(database, axis=1), "cityblock")
    np.testing.assert_array_equal(ranking.hamming_distances(queries, database), expected)


def test_one_row_larger_than_a_chunk_matches_scipy():
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 256, (2, 2), dtype=np.uint8)
    database = rng.integers(0, 256, (ranking._CHUNK + 3, 2), dtype=np.uint8)
    expected = cdist(np.unpackbits(queries, axis=1), np.unpackbits(database, axis=1), "cityblock")
    np.testing.assert_array_equal(ranking.hamming_distances(queries, database), expected)


def test_distances_of_a_strided_view():
    """Every other byte of every third row: nothing may rely on contiguous memory."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (30, 16), dtype=np.uint8)[::3, ::2]
    expected = [[differing_bits(a, b) for b in codes] for a in codes]
    np.testing.assert_array_equal(ranking.hamming_distances(codes, codes), expected)


@given(code_pairs(), st.data())
def test_rank_matches_a_stable_sort(pair, data):
    queries, database = pair
    k = data.draw(st.integers(1, len(database)))
    ranks = ranking.rank(queries, database, k)
    assert ranks.dtype == np.int32
    np.testing.assert_array_equal(ranks, ranks_by_sorting(queries, database, k))


@pytest.mark.parametrize("k", [1, 6, 50])
def test_rank_of_identical_codes_is_database_order(k):
    codes = np.full((50, 8), 170, np.uint8)
    np.testing.assert_array_equal(ranking.rank(codes[:2], codes, k), [np.arange(k)] * 2)


def test_rank_of_4096_bits_matches_a_stable_sort():
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 256, (2, 512), dtype=np.uint8)
    database = rng.integers(0, 256, (60, 512), dtype=np.uint8)
    np.testing.assert_array_equal(ranking.rank(queries, database, 60), ranks_by_sorting(queries, database, 60))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("near", [0, 1, 2, 3])
@pytest.mark.parametrize("k", [1, 3000, 6000, 20_000])
def test_nearest_whatever_the_sample_says(dtype, near, k):
    """Every fourth image is near or far: where those are the sample, it promises too many or too few."""
    distances = np.random.default_rng(0).integers(5, 60, 20_000).astype(dtype)
    distances[near::4] %= 5
    expected = sorted(range(20_000), key=distances.tolist().__getitem__)[:k]
    np.testing.assert_array_equal(ranking.nearest(distances, k), expected)
    np.testing.assert_array_equal(ranking.nearest(255 - distances, 1), [np.argmax(distances)])


@given(hnp.arrays(np.uint8, st.integers(1, 60), elements=st.integers(0, 9)), st.data())
def test_kth_distance_matches_sorting(distances, data):
    k = data.draw(st.integers(1, len(distances)))
    assert ranking.kth_distance(distances, k) == sorted(distances.tolist())[k - 1]


@given(
    hnp.arrays(np.uint8, (5, 11), elements=st.sampled_from([0, 0, 0, 1, 64])),
    hnp.arrays(np.uint8, (1, 11), elements=st.sampled_from([0, 0, 0, 1, 64])),
)
def test_shares_bit_matches_sets(many, one):
    expected = [any(int(a) & int(b) for a, b in zip(row, one[0], strict=True)) for row in many]
    found = ranking.shares_bit(ranking.as_words(one).T[0], ranking.as_words(many))
    np.testing.assert_array_equal(found, expected)


CODES = np.zeros((3, 2), np.uint8)


@pytest.mark.parametrize(
    ("queries", "database", "message"),
    [
        (
            CODES.astype(np.int64),
            CODES,
            r"queries must be uint8 codes of shape .* not int64 of shape \(3, 2\): pack them",
        ),
        (CODES, CODES[0], r"database must be uint8 codes of shape .* not uint8 of shape \(2,\): pack them"),
        (CODES[:0], CODES, r"queries is empty, with shape \(0, 2\): pass at least one code"),
        (CODES, CODES[:, :0], r"database is empty, with shape \(3, 0\): pass at least one code"),
        (CODES, np.zeros((4, 3), np.uint8), r"queries has shape \(3, 2\) and database \(4, 3\).*hash both"),
        (
            np.zeros((1, 8192), np.uint8),
            CODES,
            r"queries has shape \(1, 8192\).*8191 bytes.*use shorter codes",
        ),
    ],
)
def test_malformed_codes_are_refused(queries, database, message):
    with pytest.raises(ValueError, match=message):
        ranking.hamming_distances(queries, database)
    with pytest.raises(ValueError, match=message):
        ranking.rank(queries, database, 1)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_a_k_outside_the_database_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}, but the database holds 3 codes: pass a k from 1 to 3"):
        ranking.rank(CODES, CODES, k)
