"""The losses of auto-encoders against plain loops in NumPy and SciPy."""

import jax
import numpy as np
import pytest

from cib_jax.baselines import autoencoders


def test_reconstruction_loss_is_a_plain_loops():
    generator = np.random.default_rng(1)
    shapes = {"encode 1": (3, 5), "encode 2": (5, 8), "decode 1": (8, 5), "decode 2": (5, 3)}
    params = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    params |= {f"{name} bias": generator.normal(size=shape[1]) for name, shape in shapes.items()}
    # So far from 0 that no bit is left to chance.
    params["encode 2"] *= 1e4
    rows = generator.normal(size=(4, 3))
    middle = np.maximum(rows @ params["encode 1"] + params["encode 1 bias"], 0)
    codes = np.sign(middle @ params["encode 2"] + params["encode 2 bias"])
    middle = np.maximum(codes @ params["decode 1"] + params["decode 1 bias"], 0)
    expected = np.mean((middle @ params["decode 2"] + params["decode 2 bias"] - rows) ** 2)
    found = jax.jit(autoencoders.reconstruction_loss)(params, rows, jax.random.key(0))
    assert float(found) == pytest.approx(expected, rel=1e-4)
