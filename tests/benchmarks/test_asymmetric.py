"""MAP by asymmetric distance against the order of `Index.rerank` and against `cib_jax.mean_average_precision`."""

import numpy as np
import pytest

import cib_jax as cib
from benchmarks import asymmetric
from cib_jax.codes import pack_bits

RNG = np.random.default_rng(0)
LABELS = RNG.integers(4, size=90)
SEVERAL = RNG.random((90, 5)) < 0.3


@pytest.mark.parametrize("k", [7, 60])
@pytest.mark.parametrize("labels", [LABELS, SEVERAL])
def test_the_ranking_is_that_of_rerank(labels, k):
    logits = RNG.standard_normal((90, 16), np.float32)
    codes = np.asarray(pack_bits(logits))
    index = cib.Index.of(codes[30:])
    _, ids = index.rerank(logits[:30], index.search(codes[:30], 60)[1])
    precisions = []
    for own, found in zip(labels[:30], ids[:, :k], strict=True):
        relevant = [np.any((own == labels[30 + i]) & (own > 0 if labels.ndim == 2 else True)) for i in found]
        hits = [sum(relevant[: rank + 1]) / (rank + 1) for rank in range(k) if relevant[rank]]
        precisions.append(sum(hits) / max(1, len(hits)))
    measured = asymmetric.mean_average_precision(logits[:30], codes[30:], labels[:30], labels[30:], k)
    assert measured == pytest.approx(np.mean(precisions), abs=1e-6)


@pytest.mark.parametrize("k", [7, 60])
def test_without_certainty_it_is_the_map_of_hamming_distances(k):
    codes = RNG.integers(256, size=(90, 3), dtype=np.uint8)
    signs = np.unpackbits(codes[:30], axis=1).astype(np.float32) - 0.5
    measured = asymmetric.mean_average_precision(signs, codes[30:], LABELS[:30], LABELS[30:], k)
    assert measured == pytest.approx(
        cib.mean_average_precision(codes[:30], codes[30:], LABELS[:30], LABELS[30:], k=k), abs=1e-6
    )
