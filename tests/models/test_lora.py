"""Low-rank corrections against NumPy in float64: which kernels have them, what they add, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cib_jax.models import finetune

GENERATOR = np.random.default_rng(0)


def normal(*shape):
    return GENERATOR.normal(size=shape).astype(np.float32)


STATE = {
    "stem": {"kernel": normal(3, 3, 2, 6), "bias": normal(6)},
    "blocks": {
        0: {"depthwise": {"kernel": normal(3, 3, 1, 6)}, "project": {"kernel": normal(1, 1, 6, 4), "bias": normal(4)}},
        1: {"scale": normal(4)},
    },
    "linear": {"kernel": normal(4, 5), "bias": normal(5)},
}
SCALE = 2.5


@pytest.fixture(scope="module")
def factors():
    """As in the middle of training: neither factor is 0."""
    return jax.tree.map(lambda leaf: jnp.asarray(normal(*leaf.shape)), finetune.create(jax.random.key(0), STATE, 2))


def test_products_and_convolutions_have_corrections_and_depthwise_ones_have_none():
    assert list(finetune.kernels(STATE)) == [
        ("stem/kernel", (18, 6)),
        ("blocks/0/project/kernel", (6, 4)),
        ("linear/kernel", (4, 5)),
    ]
    made = finetune.create(jax.random.key(0), STATE, 2)
    assert jax.tree.map(np.shape, made) == {
        "stem": {"kernel": {"a": (18, 2), "b": (2, 6)}},
        "blocks": {0: {"project": {"kernel": {"a": (6, 2), "b": (2, 4)}}}},
        "linear": {"kernel": {"a": (4, 2), "b": (2, 5)}},
    }


def test_the_start_is_the_state_itself_and_not_flat():
    made = finetune.create(jax.random.key(0), STATE, 2)
    for together in (finetune.corrected, finetune.merged):
        jax.tree.map(np.testing.assert_array_equal, together(STATE, made, SCALE), STATE)
    a = np.asarray(finetune.create(jax.random.key(1), {"fc": {"kernel": normal(400, 30)}}, 20)["fc"]["kernel"]["a"])
    assert abs(a.std() * 400**0.5 - 1) < 0.05
    assert abs(a.mean() * 400**0.5) < 0.05


def test_a_kernel_is_w_plus_the_scaled_product(factors):
    for together in (finetune.corrected, finetune.merged):
        found = together(STATE, factors, SCALE)
        for path in (("stem",), ("blocks", 0, "project"), ("linear",)):
            state, pair, mine = STATE, factors, found
            for name in path:
                state, pair, mine = state[name], pair[name], mine[name]
            a, b = (np.asarray(pair["kernel"][name], np.float64) for name in "ab")
            shape = state["kernel"].shape
            expected = state["kernel"] + SCALE * np.einsum("ir,ro->io", a, b).reshape(shape)
            np.testing.assert_allclose(mine["kernel"], expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(mine["bias"], state["bias"])
        np.testing.assert_array_equal(
            found["blocks"][0]["depthwise"]["kernel"], STATE["blocks"][0]["depthwise"]["kernel"]
        )
        np.testing.assert_array_equal(found["blocks"][1]["scale"], STATE["blocks"][1]["scale"])


def test_merged_weights_are_rounded_once(factors):
    """Of kernels in bfloat16 too: to float32, not to what they are held in."""
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), STATE)
    pair = factors["linear"]["kernel"]
    exact = np.float64(half["linear"]["kernel"]) + SCALE * np.float64(pair["a"]) @ np.float64(pair["b"])
    np.testing.assert_array_equal(finetune.merged(half, factors, SCALE)["linear"]["kernel"], exact.astype(np.float32))


def test_gradients_are_those_of_the_formula(factors):
    """With G the gradient of W: that of A is s · G · Bᵀ, that of B is s · Aᵀ · G."""
    weights = jax.tree.map(lambda leaf: jnp.asarray(normal(*np.shape(leaf))), STATE)

    def loss(factors):
        whole = finetune.corrected(STATE, factors, SCALE)
        return sum(jnp.sum(w * jnp.sin(x)) for w, x in zip(*map(jax.tree.leaves, (weights, whole)), strict=True))

    gradients = jax.grad(loss)(factors)
    for path in (("stem",), ("blocks", 0, "project"), ("linear",)):
        state, pair, weight, mine = STATE, factors, weights, gradients
        for name in path:
            state, pair, weight, mine = state[name], pair[name], weight[name], mine[name]
        a, b = (np.asarray(pair["kernel"][name], np.float64) for name in "ab")
        columns = b.shape[1]
        kernel = np.float64(state["kernel"]).reshape(-1, columns) + SCALE * a @ b
        of_kernel = np.float64(weight["kernel"]).reshape(-1, columns) * np.cos(kernel)
        np.testing.assert_allclose(mine["kernel"]["a"], SCALE * of_kernel @ b.T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mine["kernel"]["b"], SCALE * a.T @ of_kernel, rtol=1e-4, atol=1e-4)
