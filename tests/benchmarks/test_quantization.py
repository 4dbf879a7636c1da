"""MeCoQ's contrast and ranking against plain loops."""

import jax
import numpy as np
import pytest

from benchmarks import quantization
from benchmarks.quantization import Settings


@pytest.mark.parametrize("active", [0.0, 1.0])
def test_the_contrast_is_a_plain_loops(active):
    generator = np.random.default_rng(0)
    pair, memory = generator.normal(size=(2, 4, 6)), generator.normal(size=(5, 6))
    rows, kept = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (pair.reshape(8, 6), memory))
    temperature, prior, expected = 0.35, 0.1, 0.0
    for i in range(8):
        other = (i + 4) % 8
        negatives = [rows[j] for j in range(8) if j not in (i, other)] + list(kept) * int(active)
        positive = np.exp(rows[i] @ rows[other] / temperature)
        total = sum(np.exp(rows[i] @ row / temperature) for row in negatives)
        count = len(negatives)
        corrected = max((total - prior * count * positive) / (1 - prior), count * np.exp(-1 / temperature))
        expected -= np.log(positive / (positive + corrected)) / 8
    found = jax.jit(quantization.contrast, static_argnums=3)(pair, memory, active, Settings(temperature, prior, 1e-3))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_map_is_that_of_a_plain_loop_with_ties_in_order():
    generator = np.random.default_rng(1)
    tables, words = generator.normal(size=(3, 2, 4)), generator.integers(0, 4, (12, 2)).astype(np.uint8)
    relevant = generator.random((3, 12)) < 0.4
    expected = []
    for table, hits in zip(tables, relevant, strict=True):
        scores = [sum(table[book, word] for book, word in enumerate(code)) for code in words]
        ranked = [hits[i] for i in sorted(range(12), key=lambda i: (-scores[i], i))][:8]
        precisions = [sum(ranked[: i + 1]) / (i + 1) for i in range(8) if ranked[i]]
        expected.append(np.mean(precisions) if precisions else 0.0)
    found = quantization.mean_average_precision(tables, words, relevant, 8)
    assert found == pytest.approx(np.mean(expected), rel=1e-12)
