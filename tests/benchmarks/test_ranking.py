"""Rankings by real numbers against sorting, and their MAP against scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics

from benchmarks import ranking


@pytest.mark.parametrize("k", [1, 7, 40, 50])
def test_the_highest_come_first_and_ties_by_id(k):
    scores = np.random.default_rng(0).integers(9, size=40).astype(np.float32)
    scores[3] = -np.inf
    wanted = sorted(range(40), key=lambda number: (-scores[number], number))[:k]
    assert ranking.highest(scores, k).tolist() == wanted


def test_map_of_a_whole_ranking_is_scikit_learns_average_precision():
    relevant = np.random.default_rng(0).random((6, 40)) < 0.3
    scores = -np.arange(40)
    wanted = np.mean([sklearn.metrics.average_precision_score(row, scores) for row in relevant])
    assert ranking.mean_average_precision(relevant) == pytest.approx(wanted)
