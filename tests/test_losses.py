"""The objective against loops in float64, SciPy and finite differences, and at its extremes."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.special
import scipy.stats

from cib_jax import losses
from cib_jax.codes import sample_codes


def reference_nt_xent(codes1, codes2, temperature):
    """NT-Xent term by term as it is written in the paper, in float64."""
    codes = np.concatenate([codes1, codes2]).astype(np.float64)
    n = len(codes1)

    def similarity(a, b):
        return math.fsum(a * b) / math.sqrt(math.fsum(a * a)) / math.sqrt(math.fsum(b * b)) / temperature

    total = 0.0
    for i in range(2 * n):
        others = [similarity(codes[i], codes[k]) for k in range(2 * n) if k != i]
        total += scipy.special.logsumexp(others) - similarity(codes[i], codes[(i + n) % (2 * n)])
    return total / (2 * n)


def reference_kl(logits, target):
    """scipy.stats.entropy of the two-point distributions, bit by bit."""
    total = 0.0
    for x, y in zip(logits.ravel(), target.ravel(), strict=True):
        p, q = scipy.special.expit([[x, -x], [y, -y]])
        total += scipy.stats.entropy(p, q)
    return total / len(logits)


def draw(seed, batch, bits, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal((batch, bits))).astype(np.float32)


@pytest.mark.parametrize(("batch", "bits", "temperature"), [(2, 8, 0.3), (5, 16, 0.1), (17, 64, 1.0)])
@pytest.mark.parametrize("continuous", [True, False])
def test_nt_xent_matches_the_loop(batch, bits, temperature, continuous):
    codes1, codes2 = draw(0, batch, bits), draw(1, batch, bits)
    if not continuous:
        codes1, codes2 = np.sign(codes1), np.sign(codes2)
    value = losses.nt_xent(jnp.asarray(codes1), jnp.asarray(codes2), temperature=temperature)
    np.testing.assert_allclose(value, reference_nt_xent(codes1, codes2, temperature), rtol=2e-6)


def test_nt_xent_matches_optax():
    codes1, codes2 = draw(2, 9, 32), draw(3, 9, 32)
    labels = jnp.concatenate([jnp.arange(9), jnp.arange(9)])
    expected = optax.ntxent(jnp.concatenate([codes1, codes2]), labels, temperature=0.3)
    np.testing.assert_allclose(losses.nt_xent(jnp.asarray(codes1), jnp.asarray(codes2)), expected, rtol=1e-5)


def test_nt_xent_of_identical_codes_is_its_closed_form():
    """All 2N − 1 others look alike: log(2N − 1), whatever the temperature."""
    for batch, temperature in itertools.product((2, 7), (0.05, 0.3)):
        codes = jnp.ones((batch, 16))
        value = losses.nt_xent(codes, codes, temperature=temperature)
        np.testing.assert_allclose(value, math.log(2 * batch - 1), rtol=1e-5)


@pytest.mark.parametrize(("scale", "seed"), [(0.1, 0), (1.0, 1), (5.0, 2)])
def test_bernoulli_kl_matches_scipy(scale, seed):
    logits, target = draw(seed, 6, 24, scale), draw(seed + 10, 6, 24, scale)
    value = losses.bernoulli_kl(jnp.asarray(logits), jnp.asarray(target))
    np.testing.assert_allclose(value, reference_kl(logits.astype(np.float64), target.astype(np.float64)), rtol=1e-4)


@hypothesis.given(st.integers(0, 2**31), st.floats(0.0, 50.0))
def test_bernoulli_kl_is_never_negative_and_zero_on_itself(seed, scale):
    logits, target = jnp.asarray(draw(seed, 3, 8, scale)), jnp.asarray(draw(seed + 1, 3, 8, scale))
    assert losses.bernoulli_kl(logits, target) >= -1e-4
    assert losses.bernoulli_kl(logits, logits) == 0


def finite_difference(function, x, direction, step=1e-3):
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


def test_gradients_match_finite_differences_where_the_function_is_smooth():
    """Of NT-Xent on continuous codes and of KL, along random directions, against the float64 references."""
    logits1, logits2 = draw(4, 5, 8), draw(5, 5, 8)
    wide1, wide2 = logits1.astype(np.float64), logits2.astype(np.float64)
    for seed in range(3):
        direction = draw(6 + seed, 5, 8).astype(np.float64)
        gradient = jax.grad(lambda x: losses.nt_xent(x, jnp.asarray(logits2)))(jnp.asarray(logits1))
        expected = finite_difference(lambda x: reference_nt_xent(x, wide2, 0.3), wide1, direction)
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-3, atol=1e-5)
        gradient = jax.grad(lambda x: losses.bernoulli_kl(x, jnp.asarray(logits2)))(jnp.asarray(logits1))
        expected = finite_difference(lambda x: reference_kl(x, wide2), wide1, direction)
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-3, atol=1e-5)


def test_no_gradient_reaches_the_target_of_the_kl():
    logits, target = jnp.asarray(draw(9, 4, 8)), jnp.asarray(draw(10, 4, 8))
    assert not jnp.any(jax.grad(losses.bernoulli_kl, argnums=1)(logits, target))


def test_the_objectives_are_made_of_their_parts():
    """Deterministic codes, so that the references see the same ones."""
    logits1, logits2 = draw(11, 6, 16), draw(12, 6, 16)
    key, wide1, wide2 = jax.random.key(0), logits1.astype(np.float64), logits2.astype(np.float64)
    codes, coordinates = [np.where(logits > 0, 1.0, -1.0) for logits in (logits1, logits2)], draw(15, 6, 3)
    on_codes = reference_nt_xent(*codes, 0.2)
    kl = (reference_kl(wide1, wide2) + reference_kl(wide2, wide1)) / 2
    expected = {
        "naive_cl": reference_nt_xent(wide1, wide2, 0.2),
        "cl_hash": on_codes,
        "cibhash": on_codes + 0.05 * kl,
        "diffusion": reference_diffusion_match(*codes, coordinates, 0.2, 6.0) + 0.05 * kl,
    }
    assert set(expected) == set(losses.OBJECTIVES)
    for name, value in expected.items():
        loss, terms = losses.cib_loss(
            key,
            jnp.asarray(logits1),
            jnp.asarray(logits2),
            objective=name,
            temperature=0.2,
            beta=0.05,
            stochastic=False,
            coordinates=jnp.asarray(coordinates) if losses.OBJECTIVES[name].taught else None,
        )
        np.testing.assert_allclose(loss, value, rtol=1e-5)
        np.testing.assert_allclose(terms["kl"], kl, rtol=1e-5)
        assert terms["loss"] == loss


def test_the_gradient_of_the_loss_is_the_chain_through_the_codes():
    """Straight through: the gradient of the contrast in the codes (finite differences in float64), times p (1 − p)."""
    logits1, logits2 = draw(13, 4, 8), draw(14, 4, 8)
    gradient = jax.grad(
        lambda x: losses.cib_loss(jax.random.key(0), x, jnp.asarray(logits2), objective="cl_hash", stochastic=False)[0]
    )(jnp.asarray(logits1))
    codes1, codes2 = np.where(logits1 > 0, 1.0, -1.0), np.where(logits2 > 0, 1.0, -1.0)
    p = scipy.special.expit(logits1.astype(np.float64))
    for row, bit in [(0, 0), (1, 5), (3, 7)]:
        unit = np.zeros((4, 8))
        unit[row, bit] = 1.0
        slope = finite_difference(lambda x: reference_nt_xent(x, codes2, 0.3), codes1, unit, 1e-4)
        np.testing.assert_allclose(gradient[row, bit], slope * p[row, bit] * (1 - p[row, bit]), rtol=1e-3, atol=1e-7)


def test_the_views_bits_are_drawn_independently():
    """Under one key, two views with the same logits get different bits."""
    logits = jnp.zeros((64, 64))
    first = sample_codes(jax.random.fold_in(jax.random.key(0), 1), logits)
    second = sample_codes(jax.random.fold_in(jax.random.key(0), 2), logits)
    loss, _ = losses.cib_loss(jax.random.key(0), logits, logits, objective="cl_hash")
    np.testing.assert_allclose(loss, reference_nt_xent(np.asarray(first), np.asarray(second), 0.3), rtol=1e-5)
    assert abs(float(jnp.mean(first * second))) < 0.1


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_loss_and_gradient_stay_finite(name):
    """For huge and vanishing logits, opposite views, identical codes, a batch of 2."""
    coordinates = jnp.asarray([[1e3, 0.0], [-1e3, 0.0]]) if losses.OBJECTIVES[name].taught else None

    def of_logits(x, y):
        return losses.cib_loss(jax.random.key(0), x, y, objective=name, coordinates=coordinates)[0]

    loss = jax.jit(jax.value_and_grad(of_logits))
    for magnitude, sign in itertools.product((0.0, 1e-30, 1.0, 1e4, 1e18), (1, -1)):
        logits = jnp.full((2, 16), magnitude)
        value, gradient = loss(logits, sign * logits)
        assert np.isfinite(value), (magnitude, sign)
        assert np.all(np.isfinite(gradient)), (magnitude, sign)


def test_bad_input_is_refused():
    ones = jnp.ones((4, 8))
    with pytest.raises(ValueError, match=r"at least 2 images"):
        losses.nt_xent(ones[:1], ones[:1])
    with pytest.raises(ValueError, match=r"codes1 \(4, 8\) and codes2 \(3, 8\)"):
        losses.nt_xent(ones, ones[:3])
    with pytest.raises(ValueError, match=r"must both be \[batch, bits\]"):
        losses.bernoulli_kl(ones, ones[:, :4])
    with pytest.raises(ValueError, match=r"'simclr' is not one of naive_cl, cl_hash, cibhash"):
        losses.cib_loss(jax.random.key(0), ones, ones, objective="simclr")


def reference_diffusion_match(codes1, codes2, coordinates, temperature, sharpness):
    """Row by row in float64, by scipy.stats.entropy."""
    odds = np.maximum(coordinates.astype(np.float64) @ coordinates.T, 1e-6) ** sharpness
    total = 0.0
    for asking, asked in ((codes1, codes2), (codes2, codes1)):
        cosines = asking.astype(np.float64) @ asked.T / codes1.shape[1]
        for row, wanted in zip(cosines, odds, strict=True):
            total += scipy.stats.entropy(wanted / wanted.sum(), scipy.special.softmax(row / temperature))
    return total / (2 * len(codes1))


@pytest.mark.parametrize(("batch", "bits", "temperature", "sharpness"), [(2, 8, 0.3, 1.0), (17, 64, 0.1, 6.0)])
def test_diffusion_match_is_the_divergence_of_two_rankings(batch, bits, temperature, sharpness):
    codes1, codes2 = np.sign(draw(0, batch, bits)), np.sign(draw(1, batch, bits))
    coordinates = draw(2, batch, 5)
    value = losses.diffusion_match(
        *map(jnp.asarray, (codes1, codes2, coordinates)), temperature=temperature, sharpness=sharpness
    )
    expected = reference_diffusion_match(codes1, codes2, coordinates, temperature, sharpness)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_diffusion_match_is_zero_where_codes_rank_as_the_walk_does():
    """Orthogonal codes, and coordinates whose odds are exp(similarity / τ) to the last."""
    codes = jnp.asarray(scipy.linalg.hadamard(8), jnp.float32)
    similarity = np.asarray(codes @ codes.T) / 8
    values, modes = np.linalg.eigh(np.exp(similarity / 0.5))
    coordinates = jnp.asarray(modes * np.sqrt(values), jnp.float32)
    value = losses.diffusion_match(codes, codes, coordinates, temperature=0.5, sharpness=1.0)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)


def test_only_the_objective_that_is_taught_takes_coordinates():
    logits, key = jnp.asarray(draw(0, 4, 8)), jax.random.key(0)
    with pytest.raises(ValueError, match="'diffusion' needs diffusion coordinates"):
        losses.cib_loss(key, logits, logits, objective="diffusion")
    with pytest.raises(ValueError, match="'cibhash' takes no diffusion coordinates"):
        losses.cib_loss(key, logits, logits, coordinates=logits)
    with pytest.raises(ValueError, match=r"coordinates \(3, 8\)"):
        losses.diffusion_match(logits, logits, logits[:3])
