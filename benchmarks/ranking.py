"""MAP of rankings by real numbers, of what has no packed codes: floats, codebooks, logits of queries."""

import numpy as np
from jaxtyping import Bool, Float, Int


def highest(scores: Float[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
    """Returns the ids of the `k` highest scores, highest first, ties by id; of all, if there are fewer."""
    some = np.arange(len(scores))
    if k < len(scores):
        some = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    return some[np.argsort(-scores[some], kind="stable")[:k]]


def mean_average_precision(relevant: Bool[np.ndarray, "queries k"]) -> float:
    """Returns MAP@k from the relevance of each rank, as `cib_jax.mean_average_precision` defines it."""
    hits = np.cumsum(relevant, axis=1)
    precision = hits / np.arange(1, relevant.shape[1] + 1)
    return float(np.mean((precision * relevant).sum(axis=1) / np.maximum(hits[:, -1], 1)))
