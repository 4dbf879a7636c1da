"""What the experiments on photos share: the paper's views and temperature, and features of ten views computed once."""

import ml_collections

from cib_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.backbone = "efficientnet_lite0"
    c.frozen = True
    # The best of 0, 0.3 and 0.5 on validation data of CIFAR-10 (docs/results.md) and on photos; set it to 0 for a network
    # that learns from scratch.
    c.head_dropout = 0.5
    c.image_size = 128
    c.temperature = 0.3
    c.augment = "photo"
    c.data.queries = -1
    c.train.views = 10
    return c
