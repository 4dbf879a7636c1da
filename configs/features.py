"""Features of any model: `--config.data.dir=FILE` (.npy, .npz, .parquet, .safetensors). Trains in seconds."""

import ml_collections

from cib_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.k = 0
    c.data.name = "features"
    c.data.queries = 100
    c.data.train_images = 10_000
    c.backbone = "none"
    c.frozen = True
    c.image_size = 0
    c.temperature = 0.0
    c.augment = "noise"
    c.encode_batch = 4096
    return c
