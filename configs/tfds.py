"""Any data set of tensorflow-datasets with images and labels: `--config.data.name=NAME`."""

import ml_collections

from cib_jax.configs import _photos


def get_config() -> ml_collections.ConfigDict:
    c = _photos.get_config()
    c.k = 0
    c.data.name = "oxford_flowers102"
    c.data.train_images = 10_000
    c.data.stored_size = 160
    return c
