"""Any folder of photos: `--config.data.dir=PHOTOS`. Sub-folders, if they are classes, serve only to measure."""

import ml_collections

from cib_jax.configs import _photos


def get_config() -> ml_collections.ConfigDict:
    c = _photos.get_config()
    c.k = 0
    c.data.name = "folder"
    c.data.queries = 100
    c.data.train_images = 10_000
    c.data.stored_size = 160
    return c
