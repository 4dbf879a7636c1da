"""Validation while training: the MAP of a held-out part, under parameters that keep changing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cib_jax import encoding
from cib_jax.data.sources import ImageSet
from cib_jax.encoder import Encoder, Params
from cib_jax.hasher import Hasher, packed_of_features, plain_features
from cib_jax.jobs import evaluate
from cib_jax.retrieval import metrics
from cib_jax.training.state import TrainState


def validator(
    config: ml_collections.ConfigDict, held_out: tuple[ImageSet, ImageSet], encoder: Encoder, frozen: Params
) -> Callable[[TrainState], float]:
    """Returns a function of a state that gives its validation MAP@k.

    A frozen backbone's features are computed at the first validation and kept on the host: the head alone changes.
    """
    query, database = held_out
    kept: dict[str, np.ndarray] = {}

    def codes(params: Params, images: ImageSet, name: str) -> np.ndarray:
        if "backbone" in params:
            return Hasher(encoder, params, frozen).encode_batches(evaluate.batches(config, images))
        if name not in kept:
            rows = encoding.map_batches(
                lambda batch, first: plain_features(encoder, {}, frozen, batch), evaluate.batches(config, images)
            )
            kept[name] = np.concatenate([np.asarray(row) for row in rows])
        size = 1024
        return np.concatenate(
            [
                np.asarray(packed_of_features(encoder, params, jnp.asarray(kept[name][start : start + size])))
                for start in range(0, len(kept[name]), size)
            ]
        )

    def validate(state: TrainState) -> float:
        params = jax.tree.map(jnp.asarray, state.params)
        return metrics.mean_average_precision(
            codes(params, query, "query"), codes(params, database, "database"), query.labels, database.labels, config.k
        )

    return validate
