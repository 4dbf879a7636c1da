"""The losses of auto-encoders against plain loops in NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

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


def twin_params(generator, features=3, bits=8, wide=4):
    shapes = {
        "encode 1": (features, 5),
        "encode 2": (5, bits),
        "values": (5, wide),
        "graph": (wide, wide),
        "decode 1": (wide, 5),
        "decode 2": (5, features),
        "judge bits": (bits, 1),
        "judge values": (wide, 1),
    }
    params = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    return params | {f"{name} bias": generator.normal(size=shape[1]) for name, shape in shapes.items()}


def test_the_graph_of_bits_is_a_plain_loops():
    bits = np.random.default_rng(2).integers(0, 2, (5, 8)).astype(np.float32)
    links = np.array([[(1 - np.mean(a != b)) ** 1.4 for b in bits] for a in bits])
    degrees = links.sum(axis=1)
    expected = [[links[i, j] / np.sqrt(degrees[i] * degrees[j]) for j in range(5)] for i in range(5)]
    np.testing.assert_allclose(jax.jit(autoencoders.bit_graph)(bits), expected, rtol=1e-5)


def test_the_loss_of_twin_bottlenecks_is_a_plain_loops():
    """Without discriminators that see anything, their part is that of a coin: 4 ln 2."""
    generator = np.random.default_rng(3)
    params, rows = twin_params(generator), generator.normal(size=(6, 3))
    for name in ("judge bits", "judge values"):
        params |= {name: 0 * params[name], f"{name} bias": np.zeros(1)}

    def layer(name, inputs):
        return inputs @ params[name] + params[f"{name} bias"]

    hidden = np.maximum(layer("encode 1", rows), 0)
    bits = (layer("encode 2", hidden) > 0).astype(np.float64)
    links = np.array([[(1 - np.mean(a != b)) ** 1.4 for b in bits] for a in bits])
    links /= np.sqrt(np.outer(links.sum(axis=1), links.sum(axis=1)))
    averages = scipy.special.expit(links @ layer("graph", scipy.special.expit(layer("values", hidden))))
    decoded = layer("decode 2", np.maximum(layer("decode 1", averages), 0))
    expected = np.mean([np.sum((d - r) ** 2) / 2 for d, r in zip(decoded, rows, strict=True)]) + 4 * np.log(2)
    found = jax.jit(autoencoders.twin_bottleneck_loss)(params, rows, jax.random.key(0))
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_encoder_and_discriminators_play_against_each_other():
    """Along the gradient, the discriminators' own weights lower their loss, and the encoder's raise it.

    With a decoder of zeros, all that the encoder learns from is the discriminators.
    """
    generator = np.random.default_rng(4)
    params = {name: jnp.asarray(array, jnp.float32) for name, array in twin_params(generator).items()}
    params |= {name: jnp.zeros_like(params[name]) for name in ("decode 1", "decode 2", "decode 1 bias")}
    rows, key = jnp.asarray(generator.normal(size=(6, 3)), jnp.float32), jax.random.key(1)
    loss = jax.jit(autoencoders.twin_bottleneck_loss)
    gradient = jax.jit(jax.grad(autoencoders.twin_bottleneck_loss))(params, rows, key)
    for name, sign in (("judge bits", -1), ("judge values", -1), ("graph", 1), ("values", 1)):
        there = params | {name: params[name] - 1e-2 * gradient[name]}
        assert sign * (loss(there, rows, key) - loss(params, rows, key)) > 0, name
