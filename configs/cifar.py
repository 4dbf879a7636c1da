"""CIFAR-10 in the paper's protocol, with a backbone small enough for a CPU: minutes, not hours."""

import ml_collections

from cib_jax.configs import _photos


def get_config() -> ml_collections.ConfigDict:
    c = _photos.get_config()
    c.data.name = "cifar10"
    c.data.protocol = "cifar10-10k-50k"
    c.tune.space += ", train.views=2..10"
    return c
