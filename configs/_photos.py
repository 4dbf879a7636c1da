"""What the experiments on photos share: the paper's views and temperature, and features of ten views computed once."""

import ml_collections

from cib_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.backbone = "efficientnet_lite0"
    c.frozen = True
    # Chosen on validation data of CIFAR-10 and of photos: docs/results.md. A network that learns from scratch needs 0.
    c.head_dropout = 0.5
    c.image_size = 128
    c.temperature = 0.0
    c.augment = "photo"
    c.data.queries = -1
    c.train.views = 10
    return c
