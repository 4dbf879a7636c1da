"""Any data set of tensorflow-datasets with images and labels: `--config.data.name=NAME`."""

import ml_collections

from cib_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.k = 0
    c.data.name = "oxford_flowers102"
    c.data.train_images = 10_000
    c.data.stored_size = 160
    c.backbone = "efficientnet_lite0"
    c.image_size = 128
    c.train.views = 10
    return c
