"""CIFAR-10 as in the paper: VGG-16 fc7 features at 224 pixels, fresh views at every step. Needs an accelerator.

Dropout of fc7 is that of the published code, whose VGG-16 also drops half of fc6; docs/method.md has the differences.
"""

import ml_collections

from cib_jax.configs import _photos


def get_config() -> ml_collections.ConfigDict:
    c = _photos.get_config()
    c.data.name = "cifar10"
    c.data.protocol = "cifar10-10k-50k"
    c.backbone = "vgg16"
    c.image_size = 224
    c.train.views = 0
    c.epochs = 0
    c.partial_batch = True
    return c
