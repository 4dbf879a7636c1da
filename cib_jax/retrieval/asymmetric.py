"""First hits in a finer order: how strongly a query's logits contradict a code, not only in how many bits."""

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt8

from cib_jax import binary

_BLOCK = 1 << 22  # logits compared at once


def rerank(
    codes: UInt8[np.ndarray, "n bytes"], logits: Float[np.ndarray, "queries bits"], ids: Int64[np.ndarray, "queries k"]
) -> tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
    """Returns the hits of each query by asymmetric distance, nearest first, ties in the order in which they came.

    The distance is Σ_j |l_j| over the bits j in which the code differs from that of the logits l, which is the Hamming
    distance with bits weighted by how sure the query is of them (Gordo et al., Asymmetric distances for binary
    embeddings, CVPR 2011). An id of −1 stands for no hit, at infinity.
    """
    distances = np.empty(ids.shape, np.float32)
    rows = max(1, _BLOCK // (ids.shape[1] * logits.shape[1]))
    for start in range(0, len(ids), rows):
        block = slice(start, start + rows)
        bits = binary.ones(codes[ids[block]]).view(np.bool_)
        query = logits[block].astype(np.float32)[:, None]
        distances[block] = np.where(bits == (query > 0), np.float32(0), np.abs(query)).sum(axis=-1, dtype=np.float64)
    distances[ids < 0] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)
