"""The losses of baselines that learn from views against plain loops in NumPy and SciPy."""

import jax
import numpy as np
import pytest
import scipy.special

from cib_jax.baselines import contrastive


def test_each_view_predicts_the_bits_of_the_other():
    """The loss in float64: cross-entropies by SciPy's log of the sigmoid, and coding rates by determinants."""
    first, second = np.random.default_rng(10).normal(size=(2, 9, 6))
    expected = 0.0
    for logits, bits in ((first, second > 0), (second, first > 0)):
        chance = scipy.special.log_expit(np.where(bits, logits, -logits))
        rows = logits / np.linalg.norm(logits, axis=1, keepdims=True)
        rate = np.linalg.slogdet(np.eye(6) + 6 / (9 * 0.05) * rows.T @ rows).logabsdet / 2 * (6 + 9) / (6 * 9)
        expected += (-chance.mean() - 0.1 * rate) / 2
    assert float(jax.jit(contrastive.alignment_loss)(first, second)) == pytest.approx(expected, rel=1e-4)
