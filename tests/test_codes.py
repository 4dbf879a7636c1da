"""The binary layer and the packing, against NumPy's bits and the closed form of the straight-through gradient."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from cib_jax.codes import binarize, first_bits, nested_lengths, ones, pack_bits, sample_codes, unpack_bits
from cib_jax.errors import UserError


def test_codes_are_exactly_one_or_minus_one():
    logits = 3 * jax.random.normal(jax.random.key(0), (257, 64))
    for stochastic in (True, False):
        codes = np.asarray(sample_codes(jax.random.key(1), logits, stochastic=stochastic))
        assert set(np.unique(codes)) == {-1.0, 1.0}


def test_a_logit_of_zero_gives_one_of_the_two_values():
    zeros = jnp.array([0.0, -0.0])
    assert binarize(zeros).tolist() == [-1.0, -1.0]
    assert sample_codes(jax.random.key(0), zeros, stochastic=False).tolist() == [-1.0, -1.0]
    assert pack_bits(jnp.zeros((1, 8))).tolist() == [[0]]


def test_bits_are_drawn_with_their_probabilities():
    """Each frequency over 20,000 draws within five standard deviations of σ(logit)."""
    logits = jnp.array([-30.0, -2.0, -0.5, 0.0, 0.5, 2.0, 30.0])
    draws = 20_000
    codes = np.asarray(sample_codes(jax.random.key(2), jnp.broadcast_to(logits, (draws, 7))))
    p = scipy.special.expit(np.asarray(logits, np.float64))
    assert np.all(np.abs((codes > 0).mean(0) - p) <= 5 * np.sqrt(p * (1 - p) / draws) + 1e-12)


@pytest.mark.parametrize("stochastic", [True, False])
def test_the_gradient_is_that_of_the_probability(stochastic):
    """∂b/∂p := 1, so ∂(w · b)/∂logit = w p (1 − p)."""
    logits = jax.random.normal(jax.random.key(3), (5, 16))
    weights = jax.random.normal(jax.random.key(4), (5, 16))
    gradient = jax.grad(lambda x: jnp.sum(weights * sample_codes(jax.random.key(5), x, stochastic=stochastic)))(logits)
    p = scipy.special.expit(np.asarray(logits, np.float64))
    np.testing.assert_allclose(gradient, np.asarray(weights) * p * (1 - p), rtol=1e-5)


def test_binarize_passes_no_gradient():
    assert jax.grad(lambda x: binarize(x).sum())(jnp.ones(8)).tolist() == [0.0] * 8


def test_works_under_vmap_and_forward_mode():
    logits = jax.random.normal(jax.random.key(6), (3, 4, 8))
    keys = jax.random.split(jax.random.key(7), 3)
    mapped = jax.vmap(sample_codes)(keys, logits)
    assert np.array_equal(mapped[1], sample_codes(keys[1], logits[1]))
    _, tangent = jax.jvp(lambda x: sample_codes(keys[0], x), (logits[0],), (jnp.ones((4, 8)),))
    p = scipy.special.expit(np.asarray(logits[0], np.float64))
    np.testing.assert_allclose(tangent, p * (1 - p), rtol=1e-5)


@hypothesis.given(hnp.arrays(np.bool_, st.sampled_from([(0, 8), (1, 64), (5, 12), (3, 1)])))
def test_packing_is_that_of_numpy_and_unpacking_undoes_it(bits):
    codes = np.where(bits, 1.0, -1.0).astype(np.float32)
    packed = np.asarray(pack_bits(jnp.asarray(codes)))
    assert packed.dtype == np.uint8
    assert np.array_equal(packed, np.packbits(bits, axis=-1))
    assert np.array_equal(unpack_bits(jnp.asarray(packed), bits.shape[1]), codes)
    whole = np.asarray(unpack_bits(jnp.asarray(packed)))
    assert np.array_equal(whole[:, : bits.shape[1]], codes) and (whole[:, bits.shape[1] :] == -1).all()


@pytest.mark.parametrize("bits", [8, 17, 0])
def test_bytes_of_another_number_of_bits_are_refused(bits):
    with pytest.raises(UserError) as error:
        unpack_bits(jnp.zeros((3, 2), jnp.uint8), bits)
    assert error.value.field == "bits"


@pytest.mark.parametrize("shape", [(3, 0), ()])
@pytest.mark.usefixtures("without_shape_checks")
def test_codes_without_bits_are_refused(shape):
    with pytest.raises(UserError) as error:
        pack_bits(jnp.ones(shape))
    assert error.value.field == "codes"


@pytest.mark.usefixtures("without_shape_checks")
def test_only_uint8_can_be_unpacked():
    with pytest.raises(UserError) as error:
        unpack_bits(jnp.ones((2, 2), jnp.int32))
    assert error.value.field == "packed"


def test_ones_are_the_bits_by_division():
    packed = np.array([[0b10000001, 255], [0b00000010, 0]], np.uint8)
    expected = [[int(byte) // 2**place % 2 for byte in row for place in range(7, -1, -1)] for row in packed]
    assert ones(packed).tolist() == expected
    assert ones(packed[:0]).shape == (0, 16)
    codes = 2.0 * np.array(expected) - 1
    assert np.array_equal(pack_bits(jnp.asarray(codes)), packed)


@hypothesis.given(st.integers(1, 40), st.data())
def test_the_first_bits_are_those_of_the_unpacked_codes(bits, data):
    count = data.draw(st.integers(1, bits))
    unpacked = np.random.default_rng(bits).integers(0, 2, (3, bits))
    cut = first_bits(np.packbits(unpacked, axis=1), count)
    np.testing.assert_array_equal(cut, np.packbits(unpacked[:, :count], axis=1))


@pytest.mark.parametrize(
    ("bits", "lengths"), [(1, [1]), (16, [16]), (17, [16, 17]), (64, [16, 32, 64]), (130, [16, 32, 64, 128, 130])]
)
def test_nested_codes_double_from_sixteen_bits(bits, lengths):
    assert nested_lengths(bits) == lengths
