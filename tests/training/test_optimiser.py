"""Adam with two learning rates: its first step is one rate long; where they agree, it is Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cib_jax.training import train_step

PARAMS = {
    "head": {"out": {"kernel": jnp.ones((3, 2))}},
    "backbone": {"blocks": {14: {"kernel": jnp.ones((2, 2))}}},
    "lora": {"blocks": {3: {"kernel": {"a": jnp.ones(4), "b": jnp.zeros(2)}}}},
}


def test_each_part_goes_its_own_rate_in_the_first_step():
    """Adam's first step is rate · g / |g|, whatever the size of the gradient."""
    adam = train_step.adam(1e-2, 1e-4)
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, -3.0), PARAMS)
    updates, _ = adam.update(gradients, adam.init(PARAMS), PARAMS)
    for name, rate in (("head", 1e-2), ("backbone", 1e-4), ("lora", 1e-4)):
        for leaf in jax.tree.leaves(updates[name]):
            np.testing.assert_allclose(leaf, rate, rtol=1e-5)


@pytest.mark.parametrize("own", [0.0, 1e-3])
def test_one_rate_is_plain_adam_and_its_state(own):
    adam, plain = train_step.adam(1e-3, own), optax.adam(1e-3)
    assert jax.tree.structure(adam.init(PARAMS)) == jax.tree.structure(plain.init(PARAMS))
