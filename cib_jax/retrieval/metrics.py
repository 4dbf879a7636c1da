"""Retrieval metrics of packed codes: MAP, tie-aware MAP, precision, recall and curves, as means over the queries.

Let r_i be 1 if the database image at rank i is relevant to the query, else 0, and P(i) = (r_1 + … + r_i) / i. Images
that share a label are relevant to each other. All metrics of a call come from one pass over the distances.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Array, Bool, Float64, Int64, Shaped, UInt, UInt8

from cib_jax.console import library_bar
from cib_jax.errors import UserError
from cib_jax.retrieval import hamming
from cib_jax.retrieval.hamming import Relevance, over_blocks

RADII = 5
"""Hamming radii 0 to 4 of `Curves`: beyond, lookups in a hash table touch too many buckets to be useful."""

T = TypeVar("T")
PerRadius = Float64[np.ndarray, "queries radii"]
Queries = UInt8[Array | np.ndarray, "queries bytes"]
Codes = UInt8[Array | np.ndarray, "database bytes"]
QueryLabels = Shaped[np.ndarray, "queries ..."]
Labels = Shaped[np.ndarray, "database ..."]
# The first four arguments of every metric, which travel together.
Data = tuple[Array | np.ndarray, Array | np.ndarray, np.ndarray, np.ndarray]
Progress = bool | Callable[[int], None]


def mean_average_precision(
    query_codes: Queries,
    database_codes: Codes,
    query_labels: QueryLabels,
    database_labels: Labels,
    k: int,
    *,
    progress: Progress = True,
) -> float:
    """Returns MAP@k, the mean over queries of AP@k = Σ_{i≤k} r_i P(i) / Σ_{i≤k} r_i, ties in database order.

    The divisor is the number of relevant images among the first k, as in published results; AP@k is 0 if there are
    none.

    Args:
      query_codes: Packed codes of the queries.
      database_codes: Packed codes of the database.
      query_labels: Class numbers [n], or multi-hot bool or integers [n, classes].
      database_labels: Labels of the database, of the same kind.
      k: Number of ranks, 1 to the size of the database.
      progress: Whether work of more than a second shows a progress bar in terminals and notebooks; or a function that
        is called with the number of queries of each block.

    Raises:
      UserError: Codes or labels are malformed or do not fit each other, or k is out of range.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> codes = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> labels = np.array([1]), np.array([1, 2, 1])
      >>> round(cib.mean_average_precision(*codes, *labels, k=3), 4)  # (1/1 + 2/3) / 2
      0.8333
    """
    data = query_codes, database_codes, query_labels, database_labels
    return float(_mean_over_queries(data, lambda block: _average_precision(block, [k]), progress, k=k)[0])


def tie_aware_map(
    query_codes: Queries,
    database_codes: Codes,
    query_labels: QueryLabels,
    database_labels: Labels,
    k: int,
    *,
    progress: Progress = True,
) -> float:
    """Returns the expectation of MAP@k if images at one distance come in uniformly random order.

    The closed form is in `expected_average_precision` of this file. Arguments and errors are those of
    `mean_average_precision`.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> codes = np.array([[0]], np.uint8), np.array([[1], [2]], np.uint8)  # both at distance 1
      >>> labels = np.array([1]), np.array([1, 2])
      >>> cib.tie_aware_map(*codes, *labels, k=2)  # (1 + 1/2) / 2
      0.75
    """
    data = query_codes, database_codes, query_labels, database_labels
    means = _mean_over_queries(data, lambda block: _tie_aware(block, k), progress, k=k, ranks=False, histograms=True)
    return float(means[0])


def precision_at_k(
    query_codes: Queries,
    database_codes: Codes,
    query_labels: QueryLabels,
    database_labels: Labels,
    ks: Sequence[int],
    *,
    progress: Progress = True,
) -> dict[int, float]:
    """Returns, for each k, the mean over queries of P(k) = (r_1 + … + r_k) / k, ties in database order.

    Other arguments are those of `mean_average_precision`.

    Args:
      ks: Numbers of ranks, each 1 to the size of the database.

    Raises:
      UserError: Codes or labels are malformed or do not fit each other, `ks` is empty, or a k is out of range.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> codes = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> labels = np.array([1]), np.array([1, 2, 1])
      >>> cib.precision_at_k(*codes, *labels, ks=[1, 2])
      {1: 1.0, 2: 0.5}
    """
    return _mean_at_ks((query_codes, database_codes, query_labels, database_labels), ks, _precision, progress)


def recall_at_k(
    query_codes: Queries,
    database_codes: Codes,
    query_labels: QueryLabels,
    database_labels: Labels,
    ks: Sequence[int],
    *,
    progress: Progress = True,
) -> dict[int, float]:
    """Returns, for each k, the mean over queries of (r_1 + … + r_k) / R, with R relevant images in the database.

    A query with R = 0 counts as 0. Ties in database order. Arguments and errors are those of `precision_at_k`.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> codes = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> labels = np.array([1]), np.array([1, 2, 1])
      >>> cib.recall_at_k(*codes, *labels, ks=[1, 3])
      {1: 0.5, 3: 1.0}
    """
    return _mean_at_ks((query_codes, database_codes, query_labels, database_labels), ks, _recall, progress)


def precision_within_radius(
    query_codes: Queries,
    database_codes: Codes,
    query_labels: QueryLabels,
    database_labels: Labels,
    radius: int = 2,
    *,
    progress: Progress = True,
) -> tuple[float, float]:
    """Returns the mean precision of lookups in a Hamming ball, and the share of queries with an empty ball.

    The precision of one query is (relevant images within the radius) / (images within the radius); an empty ball is a
    failed lookup of precision 0, the field's convention. Other arguments are those of `mean_average_precision`.

    Args:
      radius: Radius in bits, inclusive.

    Raises:
      UserError: Codes or labels are malformed or do not fit each other, or the radius is negative.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> codes = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> labels = np.array([1]), np.array([1, 2, 1])
      >>> cib.precision_within_radius(*codes, *labels, radius=1)
      (0.5, 0.0)
    """
    if radius < 0:
        raise UserError(f"radius must be 0 or more bits, got {radius}", field="radius")
    data = query_codes, database_codes, query_labels, database_labels

    def lookup(block: Block) -> Float64[np.ndarray, "queries 2"]:
        precision, _, empty = _balls(block)
        at = min(radius, precision.shape[1] - 1)
        return np.stack([precision[:, at], empty[:, at]], axis=1)

    precision, empty = _mean_over_queries(data, lookup, progress, ranks=False, histograms=True).tolist()
    return precision, empty


def precision_recall_curve(
    query_codes: Queries,
    database_codes: Codes,
    query_labels: QueryLabels,
    database_labels: Labels,
    *,
    progress: Progress = True,
) -> tuple[Float64[np.ndarray, " radii"], Float64[np.ndarray, " radii"]]:
    """Returns precision and recall of Hamming balls of radius 0, 1, …, bits, each the mean over queries.

    An empty ball counts as precision 0 and a query without relevant images as recall 0. Arguments and errors are those
    of `mean_average_precision`.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> codes = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> labels = np.array([1]), np.array([1, 2, 1])
      >>> precision, recall = cib.precision_recall_curve(*codes, *labels)
      >>> precision[:3].round(3).tolist(), recall[:3].tolist()
      ([1.0, 0.5, 0.667], [0.5, 0.5, 1.0])
    """
    data = query_codes, database_codes, query_labels, database_labels
    means = _mean_over_queries(data, lambda block: np.hstack(_balls(block)[:2]), progress, ranks=False, histograms=True)
    precision, recall = np.split(means, 2)
    return precision, recall


def evaluate(
    query_codes: Queries,
    database_codes: Codes,
    query_labels: QueryLabels,
    database_labels: Labels,
    k: int,
    *,
    progress: Progress = True,
) -> dict[str, Any]:
    """Returns every metric of this module from one pass over the distances, as plain numbers and lists.

    `precision_at_k` holds the lists `k` (the powers of ten up to k, and k), `precision` and `recall`;
    `precision_recall` holds the lists `radius`, `precision` and `recall`. Arguments and errors are those of
    `mean_average_precision`.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> codes = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> labels = np.array([1]), np.array([1, 2, 1])
      >>> figures = cib.evaluate(*codes, *labels, k=3)
      >>> round(figures["map"], 4), figures["precision_at_k"]["k"]
      (0.8333, [1, 3])
    """
    data = query_codes, database_codes, query_labels, database_labels
    ks = _ranks_up_to(k, digits=(1,))

    def per_query(block: Block) -> Float64[np.ndarray, "queries metrics"]:
        at_k = _average_precision(block, [k]), _tie_aware(block, k)
        return np.concatenate([*at_k, _precision(block, ks), _recall(block, ks), *_balls(block)], axis=1)

    means = _mean_over_queries(data, per_query, progress, k=k, histograms=True)
    radii = 8 * database_codes.shape[1] + 1
    ends = np.cumsum([1, 1, len(ks), len(ks), radii, radii])
    (average,), (expected,), precision, recall, *balls = (part.tolist() for part in np.split(means, ends))
    ball_precision, ball_recall, ball_empty = balls
    return {
        "map": average,
        "map_tie_aware": expected,
        "precision_at_k": {"k": ks, "precision": precision, "recall": recall},
        "precision_radius_2": ball_precision[2],
        "empty_radius_2": ball_empty[2],
        "precision_recall": {"radius": list(range(radii)), "precision": ball_precision, "recall": ball_recall},
        "queries": len(query_codes),
        "database": len(database_codes),
        "k": k,
    }


class Curves(NamedTuple):
    """Curves of a ranking for a report: means over queries, except for the last five fields."""

    k: list[int]
    """Ranks 1, 2, 5, 10, 20, … and the largest."""
    map: Float64[np.ndarray, " ks"]
    precision: Float64[np.ndarray, " ks"]
    recall: Float64[np.ndarray, " ks"]
    radius_precision: Float64[np.ndarray, " radii"]
    """Precision within each Hamming radius from 0 on; an empty ball counts as 0."""
    radius_empty: Float64[np.ndarray, " radii"]
    relevant: Float64[np.ndarray, " distances"]
    irrelevant: Float64[np.ndarray, " distances"]
    """Shares of the relevant and of the irrelevant pairs at each distance 0, 1, …, bits; all 0 if there are none."""
    chance: float
    """Share of all pairs that are relevant: the expected precision of a random ranking."""
    average_precision: Float64[np.ndarray, " queries"]
    """AP@k of every query, for the largest k."""
    answerable: Bool[np.ndarray, " queries"]
    """Whether the database has an image that is relevant to the query."""


def curves(
    query_codes: Queries,
    database_codes: Codes,
    query_labels: QueryLabels,
    database_labels: Labels,
    k: int,
    *,
    progress: Progress = True,
) -> Curves:
    """Returns the curves of a ranking up to rank k, ties in database order.

    Arguments and errors are those of `mean_average_precision`.
    """
    ks = _ranks_up_to(k, digits=(1, 2, 5))

    def sums_and_rows(block: Block) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        average = _average_precision(block, ks)
        precision, _, empty = (part[:, :RADII] for part in _balls(block))
        at_ranks = average, _precision(block, ks), _recall(block, ks)
        parts = *at_ranks, precision, empty, block.relevant, block.counts - block.relevant
        return [part.sum(axis=0) for part in parts], average[:, -1], block.relevant.sum(axis=1) > 0

    data = query_codes, database_codes, query_labels, database_labels
    sums, average_precision, answerable = zip(
        *each_block(data, sums_and_rows, progress, k=k, histograms=True), strict=True
    )
    totals = [np.sum(parts, axis=0) for parts in zip(*sums, strict=True)]
    hits, misses = (int(counts.sum()) for counts in totals[5:])
    mean_ap, precision, recall, radius_precision, radius_empty = (total / len(query_codes) for total in totals[:5])
    return Curves(
        ks,
        mean_ap,
        precision,
        recall,
        radius_precision,
        radius_empty,
        relevant=totals[5] / max(hits, 1),
        irrelevant=totals[6] / max(misses, 1),
        chance=hits / (hits + misses),
        average_precision=np.concatenate(average_precision),
        answerable=np.concatenate(answerable),
    )


def _ranks_up_to(k: int, digits: Sequence[int]) -> list[int]:
    """Returns the numbers up to k that are one of the digits times a power of ten, and k."""
    return sorted({k, *(digit * 10**power for power in range(9) for digit in digits if digit * 10**power <= k)})


# One pass over the distances.


class Block(NamedTuple):
    """Statistics of a block of queries, from which metrics are computed; those not requested are empty."""

    ranked: Bool[np.ndarray, "queries k"]
    """r_i, and below r_1 + … + r_i."""
    hits: Int64[np.ndarray, "queries k"]
    counts: Int64[np.ndarray, "queries radii"]
    """Number of database images at each distance 0..bits, and below of the relevant ones among them."""
    relevant: Int64[np.ndarray, "queries radii"]


def each_block(
    data: Data,
    work: Callable[[Block], T],
    progress: Progress = True,
    *,
    k: int = 1,
    ranks: bool = True,
    histograms: bool = False,
) -> Iterator[T]:
    """Yields `work(block)` for each block of queries, in order.

    `ranks` and `histograms` each add one pass over the distances; set only what `work` uses.
    """
    query_codes, database_codes, query_labels, database_labels = (np.asarray(part) for part in data)
    hamming.validate_codes(query_codes, database_codes, ("query_codes", "database_codes"))
    hamming.validate_k(k, len(database_codes))
    hamming.validate_labels(query_codes, database_codes, query_labels, database_labels)
    relevance = Relevance(query_labels, database_labels)
    radii = database_codes.shape[1] * 8 + 1

    def compute(rows: slice, distances: UInt[Array, "height padded"]) -> tuple[int, T]:
        queries = rows.stop - rows.start
        ranked, counts = np.zeros((queries, 0), np.bool_), np.zeros((queries, 2, 0), np.int64)
        if ranks:
            ranked = relevance.ranked(rows, hamming.nearest(distances, rows, relevance.size, k))
        if histograms:
            counts = hamming.histograms(distances, rows, relevance, radii)
        return queries, work(Block(ranked, np.cumsum(ranked, axis=1), counts.sum(axis=1), counts[:, 1]))

    bar = library_bar("Ranking", len(query_codes), progress is True, "queries", delay=1)
    with contextlib.nullcontext(progress) if callable(progress) else bar as advance:
        for queries, result in over_blocks(query_codes, database_codes, compute):
            advance(queries)
            yield result


def _mean_over_queries(
    data: Data,
    per_query: Callable[[Block], Float64[np.ndarray, "queries metrics"]],
    progress: Progress,
    *,
    k: int = 1,
    ranks: bool = True,
    histograms: bool = False,
) -> Float64[np.ndarray, " metrics"]:
    sums = each_block(
        data, lambda block: per_query(block).sum(axis=0), progress, k=k, ranks=ranks, histograms=histograms
    )
    return np.sum(list(sums), axis=0) / len(data[0])


def _mean_at_ks(
    data: Data,
    ks: Sequence[int],
    per_query: Callable[[Block, Sequence[int]], Float64[np.ndarray, "queries ks"]],
    progress: Progress,
) -> dict[int, float]:
    if not ks:
        raise UserError("ks must have at least one k, got none", field="ks")
    for k in ks:
        hamming.validate_k(k, len(data[1]), name="ks")
    means = _mean_over_queries(
        data, lambda block: per_query(block, ks), progress, k=max(ks), histograms=per_query is _recall
    )
    return dict(zip(ks, means.tolist(), strict=True))


# Metrics of a block, one row per query.


def _average_precision(block: Block, ks: Sequence[int]) -> Float64[np.ndarray, "queries ks"]:
    at = np.asarray(ks) - 1
    # The running sum of P(i) r_i, of which each k takes one entry.
    precision = block.hits / np.arange(1, block.hits.shape[1] + 1)
    return np.cumsum(precision * block.ranked, axis=1)[:, at] / np.maximum(block.hits[:, at], 1)


def _tie_aware(block: Block, k: int) -> Float64[np.ndarray, "queries 1"]:
    return expected_average_precision(block.counts, block.relevant, k)[:, None]


def _precision(block: Block, ks: Sequence[int]) -> Float64[np.ndarray, "queries ks"]:
    return block.hits[:, np.asarray(ks) - 1] / np.asarray(ks)


def _recall(block: Block, ks: Sequence[int]) -> Float64[np.ndarray, "queries ks"]:
    return block.hits[:, np.asarray(ks) - 1] / np.maximum(block.relevant.sum(axis=1, keepdims=True), 1)


def _balls(block: Block) -> tuple[PerRadius, PerRadius, Bool[np.ndarray, "queries radii"]]:
    """Returns precision, recall and emptiness of the Hamming ball of each radius 0..bits."""
    inside = np.cumsum(block.counts, axis=1)
    hits = np.cumsum(block.relevant, axis=1)
    return hits / np.maximum(inside, 1), hits / np.maximum(hits[:, -1:], 1), inside == 0


def expected_average_precision(
    counts: Int64[np.ndarray, "queries radii"], relevant: Int64[np.ndarray, "queries radii"], k: int
) -> Float64[np.ndarray, " queries"]:
    """Returns each query's expected AP@k over random order within ties, from its histograms over distance.

    A tie group of n images, r of them relevant, comes after N images, R of them relevant. Given that m of its c places
    within the first k go to relevant images, any m places are as likely as any other: place j = 1..c holds a relevant
    image with probability m/c, preceded by R + (j−1)(m−1)/(c−1) others on average, and the group adds

        T(m) = m/c · Σ_j [R + 1 + (j−1)(m−1)/(c−1)] / (N+j)

    to the sum of precisions. A group that fits has c = n and m = r. Only the group that reaches rank k can be cut:
    there m is hypergeometric, and it also enters the divisor, so that with S the sum over the groups before it

        E[AP@k] = Σ_m P(m) · [S + T(m)] / (R + m),    P(m) = C(r,m) C(n−r,c−m) / C(n,c),

    a term being 0 if R + m = 0.

    Each row of `counts` must sum to at least k.

    References:
      McSherry & Najork, Computing information retrieval performance measures efficiently in the presence of tied
      scores, ECIR 2008; He et al., Hashing as tie-aware learning to rank, CVPR 2018.
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, k + 1))])
    end = np.cumsum(counts, axis=1)
    start = end - counts  # N
    hits = np.cumsum(relevant, axis=1) - relevant  # R
    places = np.clip(k - start, 0, counts)  # c
    # T(m) = m · first + m (m−1) · second, with Σ_j 1/(N+j) = H(N+c) − H(N) and Σ_j (j−1)/(N+j) = c − (N+1) Σ_j 1/(N+j).
    reciprocal = harmonic[np.minimum(end, k)] - harmonic[np.minimum(start, k)]
    weighted = places - (start + 1) * reciprocal
    first = (hits + 1) * reciprocal / np.maximum(places, 1)
    second = weighted / np.maximum(places * (places - 1), 1)

    cut = np.argmax(end >= k, axis=1)
    whole = np.arange(counts.shape[1]) < cut[:, None]
    before = np.sum(np.where(whole, relevant * first + relevant * (relevant - 1) * second, 0.0), axis=1)  # S

    at_cut = np.arange(len(counts)), cut
    m, probability = hypergeometric(counts[at_cut], relevant[at_cut], places[at_cut])
    group = m * first[at_cut][:, None] + m * (m - 1) * second[at_cut][:, None]
    divisor = np.maximum(hits[at_cut][:, None] + m, 1)
    return np.sum(probability * (before[:, None] + group) / divisor, axis=1)


def hypergeometric(
    total: Int64[np.ndarray, " queries"], relevant: Int64[np.ndarray, " queries"], drawn: Int64[np.ndarray, " queries"]
) -> tuple[Int64[np.ndarray, "queries support"], Float64[np.ndarray, "queries support"]]:
    """Returns the possible numbers m of relevant images among those drawn, and their probabilities.

    Rows with a smaller support than others are padded with larger m of probability 0. The probabilities come from
    ratios of neighboring ones, in logs, so that no factorial of the database's size is formed.
    """
    lowest = np.maximum(0, drawn - (total - relevant))
    highest = np.minimum(relevant, drawn)
    m = lowest[:, None] + np.arange(np.max(highest - lowest) + 1)
    inside = m[:, :-1] < highest[:, None]
    n, r, c, low = total[:, None], relevant[:, None], drawn[:, None], m[:, :-1]
    up = np.where(inside, (r - low) * (c - low), 1)
    down = np.where(inside, (low + 1) * (n - r - c + low + 1), 1)
    log_ratio = np.where(inside, np.log(up / down), -np.inf)
    log_probability = np.pad(np.cumsum(log_ratio, axis=1), ((0, 0), (1, 0)))
    weight = np.exp(log_probability - log_probability.max(axis=1, keepdims=True))
    # Up to a factor, which normalization removes: the first log is 0 for each query.
    return m, weight / weight.sum(axis=1, keepdims=True)
