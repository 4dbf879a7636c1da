"""The objective that goes past the paper on scikit-learn's digits: the settings of configs/beyond.py."""

import ml_collections

from cib_jax.configs import beyond, digits


def get_config() -> ml_collections.ConfigDict:
    return beyond.settle(digits.get_config())
