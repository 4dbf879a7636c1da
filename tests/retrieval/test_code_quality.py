"""Statistics and scores of codes against NumPy, SciPy, scikit-learn and plain loops."""

import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.neighbors import NearestNeighbors

from cib_jax.errors import UserError
from cib_jax.retrieval import code_quality
from cib_jax.retrieval.code_quality import code_health
from tests.retrieval.reference import distance, enumerated_average_precision


def unpack(packed):
    """Bit 0 is the most significant of byte 0, one shift at a time."""
    return np.array([[(byte >> (7 - i)) & 1 for byte in row for i in range(8)] for row in packed.tolist()])


def random_codes(n, width, seed=0):
    """Codes with correlated and unbalanced bits: the AND of every byte with its neighbor."""
    codes = np.random.default_rng(seed).integers(0, 256, (n, width + 1), dtype=np.uint8)
    return codes[:, 1:] & codes[:, :-1]


def test_bit_order_and_balance():
    report = code_health(np.array([[0b10000000, 0b00000001], [0b10000000, 0]], np.uint8))
    assert report["bit_balance"] == [1.0] + [0.0] * 14 + [0.5]
    assert report["worst_bit_balance"] in (0.0, 1.0)
    assert report["dead_bits"] == 15


def test_worst_balance_is_the_farthest_from_a_half():
    packed = np.packbits([[1, 1, 0, 0, 1, 1, 0, 1]] + [[1, 0, 1, 1, 0, 0, 1, 0]] * 3, axis=1)
    assert code_health(packed)["worst_bit_balance"] == 1.0


@pytest.mark.parametrize("block", [1 << 14, 64])
def test_correlation_matches_corrcoef(block, monkeypatch):
    monkeypatch.setattr(code_quality, "BLOCK", block)
    packed = random_codes(500, 3)
    correlation = np.corrcoef(unpack(packed), rowvar=False)
    pairs = [abs(correlation[i, j]) for i in range(24) for j in range(i)]
    assert code_health(packed)["mean_abs_correlation"] == pytest.approx(np.mean(pairs), rel=1e-9)


def test_correlation_leaves_dead_bits_out():
    packed = random_codes(200, 2) & np.array([0b11110000, 0], np.uint8)
    correlation = np.corrcoef(unpack(packed)[:, :4], rowvar=False)
    pairs = [abs(correlation[i, j]) for i in range(4) for j in range(i)]
    report = code_health(packed)
    assert report["dead_bits"] == 12
    assert report["mean_abs_correlation"] == pytest.approx(np.mean(pairs), rel=1e-9)


def test_equal_and_opposite_bits_correlate_fully():
    packed = np.array([[0b11000001], [0b00000011]], np.uint8)
    report = code_health(packed)
    assert report["dead_bits"] == 5
    assert report["mean_abs_correlation"] == pytest.approx(1.0)


@pytest.mark.parametrize("width", [1, 4, 9])
def test_entropy_matches_scipy(width):
    packed = random_codes(300, width) & 0b10010000
    counts = list({row: packed.tolist().count(list(row)) for row in map(tuple, packed.tolist())}.values())
    ones = unpack(packed).mean(axis=0)
    report = code_health(packed)
    assert report["distinct_codes"] == len(counts)
    assert report["entropy"] == pytest.approx(scipy.stats.entropy(counts, base=2), rel=1e-12)
    expected = np.mean([scipy.stats.entropy([p, 1 - p], base=2) for p in ones])
    assert report["mean_bit_entropy"] == pytest.approx(expected, rel=1e-12)


def test_every_code_once_is_perfect_health():
    """All 256 codes of 8 bits: 8 bits of entropy, independent and balanced."""
    report = code_health(np.arange(256, dtype=np.uint8)[:, None])
    assert report == {
        "bit_balance": [0.5] * 8,
        "worst_bit_balance": 0.5,
        "dead_bits": 0,
        "mean_abs_correlation": 0.0,
        "distinct_codes": 256,
        "entropy": pytest.approx(8.0),
        "mean_bit_entropy": pytest.approx(1.0),
    }


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.integers(0, 3)))
def test_no_codes_give_warnings_or_leave_their_range(packed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = code_health(packed)
    bits = packed.shape[1] * 8
    assert 0 <= report["mean_abs_correlation"] <= 1 + 1e-12
    assert 0 <= report["entropy"] <= min(bits, np.log2(len(packed))) + 1e-12
    assert 0 <= report["mean_bit_entropy"] <= 1
    assert 0 <= report["dead_bits"] <= bits
    assert 1 <= report["distinct_codes"] <= len(packed)


def test_identical_codes():
    report = code_health(np.full((9, 2), 0b10101010, np.uint8))
    assert report["bit_balance"] == [1.0, 0.0] * 8
    assert report["dead_bits"] == 16
    assert (report["distinct_codes"], report["mean_abs_correlation"]) == (1, 0.0)
    assert (str(report["entropy"]), str(report["mean_bit_entropy"])) == ("0.0", "0.0")


@pytest.mark.parametrize("packed", [np.zeros((3, 2), bool), np.zeros(3, np.uint8), np.zeros((0, 2), np.uint8)])
@pytest.mark.usefixtures("without_shape_checks")
def test_malformed_codes_are_refused(packed):
    for measure in (code_health, code_quality.bit_correlation, code_quality.occupancy):
        with pytest.raises(UserError) as refused:
            measure(packed)
        assert refused.value.field == "packed"


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


@given(st.integers(0, 1000))
def test_neighbour_agreement_is_the_mean_over_all_orders_of_ties(seed):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(6, 3)) + 5
    packed = generator.integers(0, 16, (6, 1), np.uint8)
    centered = features - features.mean(axis=0)
    nearest = NearestNeighbors(n_neighbors=3, metric="cosine").fit(centered).kneighbors(centered)[1][:, 1:]
    expected = []
    for query in range(6):
        others = [at for at in range(6) if at != query]
        distances = [distance(packed[query], packed[at]) for at in others]
        expected.append(enumerated_average_precision(distances, [at in nearest[query] for at in others], 5))
    assert code_quality.neighbour_agreement(packed, features, neighbours=2) == pytest.approx(
        np.mean(expected), abs=1e-9
    )


def test_neighbor_recall_counts_the_nearest_vectors_among_the_nearest_codes():
    generator = np.random.default_rng(0)
    query, database = generator.normal(size=(7, 5)), generator.normal(size=(40, 5))
    codes = [np.packbits(vectors @ generator.normal(size=(5, 8)) > 0, axis=1) for vectors in (query, database)]
    measured = code_quality.neighbor_recall(*codes, query, lambda: [database[:15], database[15:]], [3, 12])
    nearest = NearestNeighbors(n_neighbors=12, metric="cosine").fit(database).kneighbors(query)[1]
    for k in (3, 12):
        ordered = [sorted(range(40), key=lambda at, one=one: distance(one, codes[1][at]))[:k] for one in codes[0]]
        shares = [len({*found} & {*near[:k]}) / k for found, near in zip(ordered, nearest, strict=True)]
        assert measured[k] == pytest.approx(np.mean(shares))


@given(st.integers(0, 1000))
def test_view_agreement_is_the_expected_reciprocal_rank(seed):
    generator = np.random.default_rng(seed)
    one, other = (generator.integers(0, 8, (5, 1), np.uint8) for _ in range(2))
    expected = [
        enumerated_average_precision([distance(one[at], code) for code in other], [n == at for n in range(5)], 5)
        for at in range(5)
    ]
    assert code_quality.view_agreement(one, other) == pytest.approx(np.mean(expected), abs=1e-9)


@given(st.integers(0, 1000), st.integers(3, 12))
def test_separation_is_the_plain_loops(seed, n):
    packed = np.random.default_rng(seed).integers(0, 256, (n, 1), np.uint8)
    every = [[distance(a, b) for j, b in enumerate(packed) if j != i] for i, a in enumerate(packed)]
    count = max(1, round(0.3 * (n - 1)))
    nearest = np.mean([sorted(row)[:count] for row in every])
    deviation = np.std(every)
    expected = (np.mean(every) - nearest) / deviation if deviation else 0
    assert code_quality.separation(packed, share=0.3) == pytest.approx(expected, abs=1e-9)


def test_separation_rewards_groups_and_nothing_else():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 40)
    groups = generator.integers(0, 256, (10, 4), np.uint8)[labels]
    noisy = groups ^ (1 << generator.integers(0, 8, (400, 4))).astype(np.uint8)
    random = generator.integers(0, 256, (400, 4), np.uint8)
    assert code_quality.separation(noisy) > code_quality.separation(random) + 0.3
    assert code_quality.separation(np.zeros((50, 4), np.uint8)) == 0
    with pytest.raises(UserError, match="3"):
        code_quality.separation(np.zeros((2, 4), np.uint8))


def test_perfect_and_useless_codes():
    codes = np.arange(64, dtype=np.uint8)[:, None]
    assert code_quality.view_agreement(codes, codes) == 1
    same = np.zeros((64, 1), np.uint8)
    assert code_quality.view_agreement(same, same) == pytest.approx(np.mean(1 / np.arange(1, 65)))


@pytest.mark.usefixtures("without_shape_checks")
def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="21"):
        code_quality.neighbour_agreement(np.zeros((20, 1), np.uint8), np.zeros((20, 4)))
    with pytest.raises(UserError, match="packed2"):
        code_quality.view_agreement(np.zeros((3, 1), np.uint8), np.zeros((2, 1), np.uint8))
