"""MAP by asymmetric distance, as the benchmark computes it, against `Index.rerank` and `mean_average_precision`."""

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
def test_both_maps(labels, k):
    logits = RNG.standard_normal((90, 16), np.float32)
    signs = np.where(logits[30:] > 0, np.float32(1), np.float32(-1))
    split = labels[:30], labels[30:]
    hamming, finer = asymmetric.mean_average_precisions(logits[:30], signs, *split, k)
    codes = np.asarray(pack_bits(logits))
    assert hamming == pytest.approx(cib.mean_average_precision(codes[:30], codes[30:], *split, k=k), abs=1e-6)
    index = cib.Index.of(codes[30:])
    _, ids = index.rerank(logits[:30], index.search(codes[:30], 60)[1])
    precisions = []
    for own, found in zip(split[0], ids[:, :k], strict=True):
        relevant = [bool(np.any(own & split[1][i])) if labels.ndim == 2 else own == split[1][i] for i in found]
        hits = [sum(relevant[: rank + 1]) / (rank + 1) for rank in range(k) if relevant[rank]]
        precisions.append(sum(hits) / max(1, len(hits)))
    assert finer == pytest.approx(np.mean(precisions), abs=1e-6)
