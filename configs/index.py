"""An encoder for an index that is given none: learnt in a minute or two from a few thousand of its own photos."""

import ml_collections

from cib_jax.configs import folder


def get_config() -> ml_collections.ConfigDict:
    c = folder.get_config()
    c.bits = 64
    c.data.train_images = 3000
    return c
