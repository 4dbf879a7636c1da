"""NUS-WIDE in the paper's protocol: `--config.data.raw_dir=DIR` of the published files, once; see docs/data.md."""

import ml_collections

from cib_jax.configs import _photos


def get_config() -> ml_collections.ConfigDict:
    c = _photos.get_config()
    c.data.name = "nuswide"
    c.data.protocol = "nuswide-2100"
    c.data.stored_size = 160
    c.data.max_bad_fraction = 0.5  # many of its photos are on Flickr no more
    return c
