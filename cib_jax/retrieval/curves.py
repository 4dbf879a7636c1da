"""What a report draws of a ranking, beyond single figures: curves over k and radius, distances, query by query."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped, UInt8

from cib_jax.retrieval import metrics
from cib_jax.retrieval.metrics import Block

RADII = 5
"""Hamming radii 0 to 4: beyond, lookups in a hash table touch too many buckets to be of use."""


class Curves(NamedTuple):
    """Means over queries, but for the last four."""

    k: list[int]
    """1, 2, 5, 10, 20, … and the largest."""
    map: Float64[np.ndarray, " ks"]
    """MAP@k, as published figures define it."""
    precision: Float64[np.ndarray, " ks"]
    recall: Float64[np.ndarray, " ks"]
    radius_precision: Float64[np.ndarray, " radii"]
    """Precision within each Hamming radius from 0 on, an empty ball counting as 0."""
    radius_empty: Float64[np.ndarray, " radii"]
    """The share of queries that find nothing within it."""
    relevant: Float64[np.ndarray, " distances"]
    """The share of relevant pairs at each distance 0, 1, …, bits; all 0 where no pair is relevant."""
    irrelevant: Float64[np.ndarray, " distances"]
    chance: float
    """The share of all pairs that are relevant: the precision of codes that say nothing."""
    average_precision: Float64[np.ndarray, " queries"]
    """AP@k of every query, for the largest k."""
    answerable: Shaped[np.ndarray, " queries"]
    """Whether anything relevant to the query is in the database."""


def curves(
    query_codes: UInt8[np.ndarray, "queries bytes"],
    database_codes: UInt8[np.ndarray, "database bytes"],
    query_labels: Shaped[np.ndarray, "queries ..."],
    database_labels: Shaped[np.ndarray, "database ..."],
    k: int,
) -> Curves:
    """Returns the curves of a ranking, ties in database order, up to rank `k`.

    Raises:
      ValueError: as `metrics.mean_average_precision`.
    """
    ks = steps(k)
    at = np.asarray(ks) - 1

    def work(block: Block) -> tuple[Any, ...]:
        hits = block.hits
        precision_sums = np.cumsum(hits / np.arange(1, k + 1) * block.ranked, axis=1)
        average = precision_sums[:, at] / np.maximum(hits[:, at], 1)
        in_database = block.relevant.sum(axis=1)
        found = np.cumsum(block.counts[:, :RADII], axis=1)
        in_ball = np.cumsum(block.relevant[:, :RADII], axis=1) / np.maximum(found, 1)
        sums = (
            average.sum(axis=0),
            (hits[:, at] / np.asarray(ks)).sum(axis=0),
            (hits[:, at] / np.maximum(in_database, 1)[:, None]).sum(axis=0),
            in_ball.sum(axis=0),
            (found == 0).sum(axis=0),
            block.relevant.sum(axis=0),
            (block.counts - block.relevant).sum(axis=0),
        )
        return sums, average[:, -1], in_database > 0

    data = query_codes, database_codes, query_labels, database_labels
    parts = list(metrics.each_block(data, work, k=k, histograms=True))
    average, precision, recall, in_ball, empty, relevant, irrelevant = (
        np.sum([sums[number] for sums, _, _ in parts], axis=0) for number in range(7)
    )
    queries, hits = len(query_codes), int(relevant.sum())
    return Curves(
        k=ks,
        map=average / queries,
        precision=precision / queries,
        recall=recall / queries,
        radius_precision=in_ball / queries,
        radius_empty=empty / queries,
        relevant=_shares(relevant),
        irrelevant=_shares(irrelevant),
        chance=hits / (hits + int(irrelevant.sum())),
        average_precision=np.concatenate([of_queries for _, of_queries, _ in parts]),
        answerable=np.concatenate([known for _, _, known in parts]),
    )


def steps(k: int) -> list[int]:
    """Returns 1, 2, 5, 10, 20, 50, … up to k, and k."""
    return sorted({k, *(digit * 10**power for power in range(9) for digit in (1, 2, 5) if digit * 10**power <= k)})


def _shares(counts: Int64[np.ndarray, " distances"]) -> Float64[np.ndarray, " distances"]:
    return counts / max(int(counts.sum()), 1)
