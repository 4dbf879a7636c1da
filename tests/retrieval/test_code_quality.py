import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cib_jax.retrieval import code_quality
from cib_jax.retrieval.code_quality import code_health


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
    monkeypatch.setattr(code_quality, "_BLOCK", block)
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


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (
            np.zeros((3, 2), bool),
            r"packed must be uint8 codes of shape .* not bool of shape \(3, 2\): pack them",
        ),
        (
            np.zeros(3, np.uint8),
            r"packed must be uint8 codes of shape .* not uint8 of shape \(3,\): pack them",
        ),
        (np.zeros((0, 2), np.uint8), r"packed is empty, with shape \(0, 2\): pass at least one code"),
    ],
)
def test_malformed_codes_are_refused(packed, message):
    with pytest.raises(ValueError, match=message):
        code_health(packed)
