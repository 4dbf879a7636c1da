"""The blocks against SciPy in float64 and against the plain form, values and gradients; how much memory they take."""

import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from cib_jax import losses


def draw(seed, count, bits):
    return np.random.default_rng(seed).normal(size=(count, bits))


def reference(rows, codes, places):
    similarity = rows @ codes.T
    return np.array(
        [
            scipy.special.logsumexp([value for k, value in enumerate(line) if k != place])
            for line, place in zip(similarity, places, strict=True)
        ]
    )


@hypothesis.given(st.integers(1, 9), st.integers(2, 13), st.integers(1, 60), st.integers(0, 1000))
def test_any_cut_into_blocks_gives_scipys_sums(rows, codes, entries, seed):
    asked, among = draw(seed, rows, 5), draw(seed + 1, codes, 5)
    places = np.random.default_rng(seed).integers(-1, codes, rows)
    found = losses.log_sum_exp_of_others(*map(jnp.asarray, (asked, among, places)), entries=entries)
    np.testing.assert_allclose(found, reference(asked, among, places), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entries", [1, 20, 97, 300])
def test_gradients_of_blocks_are_those_of_the_plain_form(entries):
    rows, codes = jnp.asarray(draw(0, 7, 6)), jnp.asarray(draw(1, 20, 6))
    places, weights = jnp.array([0, 3, -1, 19, 5, 5, 2]), jnp.asarray(draw(2, 7, 1)[:, 0])

    def loss(rows, codes, entries):
        return jnp.sum(weights * jnp.sin(losses.log_sum_exp_of_others(rows, codes, places, entries=entries)))

    plain = jax.grad(loss, argnums=(0, 1))(rows, codes, 10**9)
    blocks = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(rows, codes, entries)
    for one, other in zip(plain, blocks, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


def test_rows_that_are_all_alike_and_far_apart_stay_finite():
    rows = 1e3 * jnp.ones((5, 4))
    value, gradients = jax.value_and_grad(
        lambda rows: jnp.sum(losses.log_sum_exp_of_others(rows, rows, jnp.arange(5), entries=7))
    )(rows)
    assert np.isfinite(value) and np.isfinite(gradients).all()


def test_a_large_batch_of_nt_xent_is_the_plain_one(monkeypatch):
    """Over the size from which blocks are taken: value, gradient of the codes, and of the temperature."""
    codes1, codes2 = (jnp.asarray(np.sign(draw(seed, 2100, 16)), jnp.float32) for seed in (0, 1))

    def both():
        return jax.value_and_grad(lambda a, b, t: losses.nt_xent(a, b, temperature=t), argnums=(0, 1, 2))(
            codes1, codes2, 0.3
        )

    blocks = both()
    monkeypatch.setattr(losses, "MAX_SIMILARITIES", 10**9)
    plain = both()
    np.testing.assert_allclose(blocks[0], plain[0], rtol=1e-6)
    for one, other in zip(blocks[1], plain[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-8)


MEASURE = """
import resource, sys, jax, jax.numpy as jnp
from cib_jax import objective
batch = int(sys.argv[1])
codes = jnp.sign(jax.random.normal(jax.random.key(0), (2, batch, 64)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step = jax.jit(jax.value_and_grad(lambda a, b: objective.nt_xent(a, b), argnums=(0, 1)))
jax.block_until_ready(step(*codes))
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_grows_with_the_batch_and_not_with_its_square():
    """8,192 images: the whole matrix would take 1 GiB, and its gradient another."""
    told = subprocess.run([sys.executable, "-c", MEASURE, "8192"], capture_output=True, text=True, check=True).stdout
    before, after = map(int, told.split())
    assert after - before < 600 << 10  # KiB
