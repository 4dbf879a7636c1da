"""A data set on which many runs take seconds: three clusters of features, and no network."""

import numpy as np

from tests import small

FEATURES = {
    "data__name": "features",
    "data__queries": 30,
    "data__train_images": 120,
    "data__train_per_class": -1,
    "data__validation_queries": 40,
    "backbone": "none",
    "frozen": True,
    "image_size": 0,
    "augment": "noise",
    "epochs": 2,
    "k": 50,
}


def config(folder, **fields):
    """Returns the config of a run on 240 items in 24 dimensions, written to `folder` once."""
    path = folder / "features.npy"
    if not path.exists():
        generator = np.random.default_rng(0)
        labels = np.arange(240) % 3
        centers = 50 + 2 * generator.normal(size=(3, 24))
        np.save(path, (centers[labels] + generator.normal(size=(240, 24))).astype(np.float32))
        np.save(folder / "features.labels.npy", labels)
    return small.config(**FEATURES | {"data__dir": str(path)} | fields)


def flags(folder, **fields):
    """Returns the same as arguments of run.py."""
    config(folder)
    return small.flags(**FEATURES | {"data__dir": folder / "features.npy"} | fields)
