"""MAP by asymmetric distance against a plain loop and against `cib_jax.mean_average_precision`."""

import numpy as np
import pytest

import cib_jax as cib
from benchmarks import asymmetric
from cib_jax.codes import pack_bits

LABELS = np.random.default_rng(0).integers(4, size=90)
SEVERAL = np.random.default_rng(1).random((90, 5)) < 0.3


@pytest.mark.parametrize("k", [7, 60])
@pytest.mark.parametrize("labels", [LABELS, SEVERAL])
def test_map_is_that_of_a_plain_loop(labels, k):
    logits = np.random.default_rng(2).integers(-99, 100, (90, 24)).astype(np.float32) / 16 + 1 / 32  # sums are exact
    codes = np.asarray(pack_bits(logits))
    precisions = []
    for query, own in zip(logits[:30], labels[:30], strict=True):
        distances = [sum(abs(x) for x, y in zip(query, other, strict=True) if x * y < 0) for other in logits[30:]]
        nearest = sorted(range(60), key=lambda i, d=distances: (d[i], i))[:k]
        relevant = [np.any(own & labels[30 + i]) if labels.ndim == 2 else own == labels[30 + i] for i in nearest]
        hits = [sum(relevant[: rank + 1]) / (rank + 1) for rank in range(k) if relevant[rank]]
        precisions.append(sum(hits) / max(1, len(hits)))
    measured = asymmetric.mean_average_precision(logits[:30], codes[30:], labels[:30], labels[30:], k)
    assert measured == pytest.approx(np.mean(precisions), abs=1e-6)


@pytest.mark.parametrize("k", [7, 60])
def test_without_certainty_it_is_the_map_of_hamming_distances(k):
    codes = np.random.default_rng(3).integers(256, size=(90, 3), dtype=np.uint8)
    signs = np.unpackbits(codes[:30], axis=1).astype(np.float32) - 0.5
    measured = asymmetric.mean_average_precision(signs, codes[30:], LABELS[:30], LABELS[30:], k)
    assert measured == pytest.approx(
        cib.mean_average_precision(codes[:30], codes[30:], LABELS[:30], LABELS[30:], k=k), abs=1e-6
    )
