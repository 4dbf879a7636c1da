"""MSCOCO in the paper's protocol: `--config.data.raw_dir=DIR` of the published files, once; see docs/data.md."""

import ml_collections

from cib_jax.configs import _photos


def get_config() -> ml_collections.ConfigDict:
    c = _photos.get_config()
    c.data.name = "mscoco/2014"
    c.data.protocol = "coco-5000"
    c.data.stored_size = 160
    return c
