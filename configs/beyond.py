"""The objective that goes past the paper, with the settings that every data set shares; see docs/beyond.md.

By itself it is CIFAR-10's config with all of the database's images for training, which is what the objective is for.
"""

import ml_collections

from cib_jax.configs import cifar


def settle(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a config with the objective and its settings; whatever depends on the data stays."""
    c.objective = "diffusion"
    c.temperature = 0.0
    c.batch_size = c.epochs = 0  # which follow from the number of images
    c.bits = 128
    c.nested = True  # one training for codes of 16, 32, 64 and 128 bits
    c.compare.bits = "16, 32, 64, 128"
    return c


def get_config() -> ml_collections.ConfigDict:
    c = settle(cifar.get_config())
    c.data.protocol = "own"
    c.k = 1000
    c.train.views = 4
    return c
