"""Losses against loops in float64, SciPy, optax and finite differences, and at extremes; the blockwise sums."""

import functools
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
from cib_jax.errors import UserError


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


# Compiled whole, since each operation of an eager call would be compiled alone for every shape.
nt_xent, bernoulli_kl = jax.jit(losses.nt_xent), jax.jit(losses.bernoulli_kl)


@pytest.mark.parametrize(("batch", "bits", "temperature"), [(2, 8, 0.3), (5, 16, 0.1), (17, 64, 1.0)])
@pytest.mark.parametrize("continuous", [True, False])
def test_nt_xent_matches_the_loop(batch, bits, temperature, continuous):
    codes1, codes2 = draw(0, batch, bits), draw(1, batch, bits)
    if not continuous:
        codes1, codes2 = np.sign(codes1), np.sign(codes2)
    value = nt_xent(codes1, codes2, temperature=temperature)
    np.testing.assert_allclose(value, reference_nt_xent(codes1, codes2, temperature), rtol=2e-6)


def test_nt_xent_matches_optax():
    codes1, codes2 = draw(2, 9, 32), draw(3, 9, 32)
    labels = jnp.concatenate([jnp.arange(9), jnp.arange(9)])
    expected = jax.jit(optax.ntxent)(jnp.concatenate([codes1, codes2]), labels, 0.3)
    np.testing.assert_allclose(nt_xent(codes1, codes2, temperature=0.3), expected, rtol=1e-5)


def test_nt_xent_of_identical_codes_is_its_closed_form():
    """All 2N − 1 others look alike: log(2N − 1), whatever the temperature."""
    for batch, temperature in itertools.product((2, 7), (0.05, 0.3)):
        codes = jnp.ones((batch, 16))
        value = nt_xent(codes, codes, temperature=temperature)
        np.testing.assert_allclose(value, math.log(2 * batch - 1), rtol=1e-5)


@pytest.mark.parametrize(("scale", "seed"), [(0.1, 0), (1.0, 1), (5.0, 2)])
def test_bernoulli_kl_matches_scipy(scale, seed):
    logits, target = draw(seed, 6, 24, scale), draw(seed + 10, 6, 24, scale)
    value = bernoulli_kl(logits, target)
    np.testing.assert_allclose(value, reference_kl(logits.astype(np.float64), target.astype(np.float64)), rtol=1e-4)


@hypothesis.given(st.integers(0, 2**31), st.floats(0.0, 50.0))
def test_bernoulli_kl_is_never_negative_and_zero_on_itself(seed, scale):
    logits, target = draw(seed, 3, 8, scale), draw(seed + 1, 3, 8, scale)
    assert bernoulli_kl(logits, target) >= -1e-4
    assert bernoulli_kl(logits, logits) == 0


def finite_difference(function, x, direction, step=1e-3):
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


def test_gradients_match_finite_differences_where_the_function_is_smooth():
    """Of NT-Xent on continuous codes and of KL, along random directions, against the float64 references."""
    logits1, logits2 = draw(4, 5, 8), draw(5, 5, 8)
    wide1, wide2 = logits1.astype(np.float64), logits2.astype(np.float64)
    contrast, kl = (jax.jit(jax.grad(loss))(logits1, logits2) for loss in (losses.nt_xent, losses.bernoulli_kl))
    for seed in range(3):
        direction = draw(6 + seed, 5, 8).astype(np.float64)
        expected = finite_difference(lambda x: reference_nt_xent(x, wide2, 0.3), wide1, direction)
        np.testing.assert_allclose(np.sum(contrast * direction), expected, rtol=1e-3, atol=1e-5)
        expected = finite_difference(lambda x: reference_kl(x, wide2), wide1, direction)
        np.testing.assert_allclose(np.sum(kl * direction), expected, rtol=1e-3, atol=1e-5)


def test_no_gradient_reaches_the_target_of_the_kl():
    logits, target = jnp.asarray(draw(9, 4, 8)), jnp.asarray(draw(10, 4, 8))
    assert not jnp.any(jax.jit(jax.grad(losses.bernoulli_kl, argnums=1))(logits, target))


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
    cib_loss = functools.partial(losses.cib_loss, temperature=0.2, beta=0.05, stochastic=False)
    for name, value in expected.items():
        loss, terms = jax.jit(cib_loss, static_argnames="objective")(
            key, logits1, logits2, objective=name, coordinates=coordinates if losses.OBJECTIVES[name].taught else None
        )
        np.testing.assert_allclose(loss, value, rtol=1e-5)
        np.testing.assert_allclose(terms["kl"], kl, rtol=1e-5)
        assert terms["loss"] == loss


def test_a_nested_loss_is_the_mean_over_the_first_bits():
    """16, 32, 64 and all 70 bits, by the references of the parts."""
    logits1, logits2 = draw(13, 4, 70), draw(14, 4, 70)
    expected = {"contrast": [], "kl": []}
    for bits in (16, 32, 64, 70):
        wide = [logits[:, :bits].astype(np.float64) for logits in (logits1, logits2)]
        expected["contrast"].append(reference_nt_xent(*(np.where(logits > 0, 1.0, -1.0) for logits in wide), 0.2))
        expected["kl"].append((reference_kl(*wide) + reference_kl(*wide[::-1])) / 2)
    options = {"temperature": 0.2, "beta": 0.05, "stochastic": False, "nested": True}
    loss, terms = jax.jit(functools.partial(losses.cib_loss, **options))(jax.random.key(0), logits1, logits2)
    for name, values in expected.items():
        np.testing.assert_allclose(terms[name], np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(expected["contrast"]) + 0.05 * np.mean(expected["kl"]), rtol=1e-5)


def test_the_gradient_of_the_loss_is_the_chain_through_the_codes():
    """Straight through: the gradient of the contrast in the codes (finite differences in float64), times p (1 − p)."""
    logits1, logits2 = draw(13, 4, 8), draw(14, 4, 8)
    gradient = jax.jit(
        jax.grad(lambda x, y: losses.cib_loss(jax.random.key(0), x, y, objective="cl_hash", stochastic=False)[0])
    )(logits1, logits2)
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
    loss, _ = jax.jit(functools.partial(losses.cib_loss, objective="cl_hash"))(jax.random.key(0), logits, logits)
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


@pytest.mark.usefixtures("without_shape_checks")
def test_invalid_arguments_are_named():
    ones, key = jnp.ones((4, 8)), jax.random.key(0)
    for field, call in (
        ("codes1", lambda: losses.nt_xent(ones[:1], ones[:1])),
        ("codes1", lambda: losses.nt_xent(ones, ones[:3])),
        ("logits", lambda: losses.bernoulli_kl(ones, ones[:, :4])),
        ("objective", lambda: losses.cib_loss(key, ones, ones, objective="simclr")),
        ("coordinates", lambda: losses.cib_loss(key, ones, ones, objective="diffusion")),
        ("coordinates", lambda: losses.cib_loss(key, ones, ones, coordinates=ones)),
        ("", lambda: losses.diffusion_match(ones, ones, ones[:3])),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert error.value.field == field


def reference_diffusion_match(codes1, codes2, coordinates, temperature, sharpness):
    """View by view in float64, by scipy.stats.entropy; a temperature of 0 follows from the coordinates."""
    odds = np.maximum(coordinates.astype(np.float64) @ coordinates.T, 1e-6) ** sharpness
    views, count = np.concatenate([codes1, codes2]).astype(np.float64), len(codes1)
    groups = np.mean(np.linalg.norm(coordinates.astype(np.float64), axis=1) ** 2)
    own, total = temperature or 0.4 / max(groups, 1) ** (1 / 3), 0.0
    for place in range(2 * count):
        others = np.delete(np.arange(2 * count), place)
        wanted = odds[place % count, others % count]
        cosines = views[others] @ views[place] / codes1.shape[1]
        total += scipy.stats.entropy(wanted / wanted.sum(), scipy.special.softmax(cosines / own))
    return total / (2 * count)


@pytest.mark.parametrize(
    ("batch", "bits", "temperature", "sharpness"), [(2, 8, 0.3, 1.0), (17, 64, 0.1, 6.0), (17, 64, 0.0, 2.0)]
)
def test_diffusion_match_is_the_divergence_of_two_rankings(batch, bits, temperature, sharpness):
    codes1, codes2 = np.sign(draw(0, batch, bits)), np.sign(draw(1, batch, bits))
    coordinates = draw(2, batch, 5)
    match = functools.partial(losses.diffusion_match, temperature=temperature, sharpness=sharpness)
    value = jax.jit(match)(codes1, codes2, coordinates)
    expected = reference_diffusion_match(codes1, codes2, coordinates, temperature, sharpness)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_diffusion_match_of_a_walk_that_links_nothing_is_the_contrast():
    codes1, codes2 = np.sign(draw(3, 5, 24)), np.sign(draw(4, 5, 24))
    value = losses.diffusion_match(jnp.asarray(codes1), jnp.asarray(codes2), jnp.eye(5), temperature=0.3)
    np.testing.assert_allclose(value, reference_nt_xent(codes1, codes2, 0.3), rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 8, 64])
def test_without_a_temperature_it_follows_from_the_number_of_groups(groups):
    """Of a walk that ends anywhere in the group where it began, whose items have coordinates of length √groups."""
    rows = np.random.default_rng(groups).integers(0, groups, 12)
    coordinates = jnp.asarray(np.sqrt(groups) * np.eye(groups)[rows], jnp.float32)
    codes = [jnp.asarray(np.sign(draw(seed, 12, 16))) for seed in (20, 21)]
    expected = losses.diffusion_match(*codes, coordinates, temperature=0.4 / groups ** (1 / 3))
    np.testing.assert_allclose(losses.diffusion_match(*codes, coordinates), expected, rtol=1e-5)


def test_without_a_temperature_a_walk_that_links_nothing_has_a_finite_gradient():
    codes1, codes2 = (jnp.asarray(np.sign(draw(seed, 6, 16))) for seed in (20, 21))
    value, gradient = jax.value_and_grad(losses.diffusion_match)(codes1, codes2, jnp.zeros((6, 2)))
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.any(gradient)


def test_diffusion_match_is_zero_where_codes_rank_as_the_walk_does():
    """Orthogonal codes, and coordinates whose odds are exp(similarity / τ) to the last."""
    codes = jnp.asarray(scipy.linalg.hadamard(8), jnp.float32)
    similarity = np.asarray(codes @ codes.T) / 8
    values, modes = np.linalg.eigh(np.exp(similarity / 0.5))
    coordinates = jnp.asarray(modes * np.sqrt(values), jnp.float32)
    value = losses.diffusion_match(codes, codes, coordinates, temperature=0.5, sharpness=1.0)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "codes", "entries"), [(1, 2, 1), (9, 13, 1), (9, 13, 25), (7, 13, 40), (8, 12, 48), (5, 6, 30), (5, 6, 60)]
)
def test_any_division_into_blocks_gives_scipys_sums(rows, codes, entries):
    """One row in a block, blocks that divide the rows evenly or not, and one block; −1 leaves no code out."""
    asked, among = draw(rows, rows, 5), draw(codes, codes, 5)
    places = np.random.default_rng(rows).integers(-1, codes, rows)
    places[0] = -1
    sums = losses.log_sum_exp_of_others(*map(jnp.asarray, (asked, among, places)), entries=entries)
    similarity = asked.astype(np.float64) @ among.T
    similarity[places[:, None] == np.arange(codes)] = -np.inf
    np.testing.assert_allclose(sums, scipy.special.logsumexp(similarity, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entries", [20, 97])
def test_gradients_of_blocks_are_those_of_the_plain_form(entries):
    rows, codes = jnp.asarray(draw(0, 7, 6)), jnp.asarray(draw(1, 20, 6))
    places, weights = jnp.array([0, 3, -1, 19, 5, 5, 2]), jnp.asarray(draw(2, 7, 1)[:, 0])

    def loss(rows, codes, entries):
        return jnp.sum(weights * jnp.sin(losses.log_sum_exp_of_others(rows, codes, places, entries=entries)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    for one, other in zip(gradient(rows, codes, 10**9), gradient(rows, codes, entries), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


def test_sums_of_equal_rows_of_large_norm_stay_finite():
    rows = 1e3 * jnp.ones((5, 4))
    value, gradients = jax.jit(
        jax.value_and_grad(
            lambda rows: jnp.sum(losses.log_sum_exp_of_others(rows, rows, jnp.arange(5, dtype=jnp.int32), entries=7))
        )
    )(rows)
    assert np.isfinite(value) and np.isfinite(gradients).all()


def test_nt_xent_of_a_large_batch_has_the_value_and_gradients_of_the_closed_form():
    """With more than 4,096 codes, from which on blocks are used: gradients of the codes and of the temperature."""
    pairs, temperature = 2100, 0.3
    codes = np.sign(draw(0, 2 * pairs, 16)).astype(np.float64)
    unit, partner = codes / 4, np.arange(2 * pairs) - pairs
    cosines = unit @ unit.T
    powers = np.exp(cosines / temperature)
    np.fill_diagonal(powers, 0)
    chances = powers / powers.sum(axis=1, keepdims=True)
    of_pairs = np.sum(unit * unit[partner], axis=1)
    value = np.mean(np.log(powers.sum(axis=1)) - of_pairs / temperature)
    slope = -np.mean(np.sum(chances * cosines, axis=1) - of_pairs) / temperature**2
    of_unit = (chances @ unit + chances.T @ unit - 2 * unit[partner]) / (2 * pairs * temperature)
    of_codes = (of_unit - unit * np.sum(unit * of_unit, axis=1, keepdims=True)) / 4

    def loss(codes1, codes2, temperature):
        return losses.nt_xent(codes1, codes2, temperature=temperature)

    halves = jnp.asarray(codes.reshape(2, pairs, 16), jnp.float32)
    found, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*halves, temperature)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(gradients[:2]), of_codes, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradients[2], slope, rtol=1e-4)


def test_memory_grows_with_the_batch_and_not_with_its_square():
    """8,192 images: the whole matrix would take 1 GiB, and its gradient another."""
    codes = jax.ShapeDtypeStruct((8192, 64), jnp.float32)
    step = jax.jit(jax.value_and_grad(losses.nt_xent, argnums=(0, 1)))
    assert step.lower(codes, codes).compile().memory_analysis().temp_size_in_bytes < 600 << 20
