"""scikit-learn's handwritten digits: no download, a small network trained from scratch, two minutes on a laptop."""

import ml_collections

from cib_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    return default.get_config()
