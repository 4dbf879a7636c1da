"""Embeddings of texts: `--config.data.dir=FILE`, such as `python -m benchmarks.wordnet` writes; see docs/text.md."""

import ml_collections

from cib_jax.configs import features


def get_config() -> ml_collections.ConfigDict:
    c = features.get_config()
    c.k = 1000
    c.data.queries = 1000
    c.data.validation = "database"
    # A fraction of the work of the defaults, for nearly their MAP: docs/text.md.
    c.hidden = 512
    c.batch_size = 128
    c.epochs = 20
    c.tune.score = "validation_map"
    return c
