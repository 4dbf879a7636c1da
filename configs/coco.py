"""MSCOCO in the paper's protocol: `--config.data.raw_dir=DIR` of the published files, once; see docs/data.md."""

import ml_collections

from cib_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.data.name = "mscoco/2014"
    c.data.protocol = "coco-5000"
    c.data.stored_size = 160
    c.backbone = "efficientnet_lite0"
    c.image_size = 128
    c.train.views = 10
    return c
