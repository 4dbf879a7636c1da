"""scikit-learn's handwritten digits: no download, a small network trained from scratch, two minutes on a laptop."""

import ml_collections

from cib_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.data.name = "digits"
    c.data.queries = 297
    c.backbone = "convnet"
    c.frozen = False
    c.image_size = 16
    c.augment = "digits"
    c.temperature = 0.5
    c.tune.score = "separation"  # the split has no validation images
    return c
