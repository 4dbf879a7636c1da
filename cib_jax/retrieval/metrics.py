"""The expectation of average precision over random order within ties, in closed form."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Array, Bool, Float64, Int64, Shaped, UInt, UInt8

from cib_jax.retrieval import hamming
from cib_jax.retrieval.hamming import Relevance, over_blocks, validate_labels

# retrieval.tie_aware: The expectation of average precision over random order within ties, in closed form.


def expected_average_precision(
    counts: Int64[np.ndarray, "queries radii"], relevant: Int64[np.ndarray, "queries radii"], k: int
) -> Float64[np.ndarray, " queries"]:
    """Returns each query's expected AP@k over random order within ties, from its histograms over distance.

    A tie group of n images, r of them relevant, comes after N images, R of them relevant. Given that m of its
    c places within the first k go to relevant images, any m places are as likely as any other: place j = 1..c
    holds a relevant image with probability m/c, preceded by R + (j−1)(m−1)/(c−1) others on average, and the
    group adds

        T(m) = m/c · Σ_j [R + 1 + (j−1)(m−1)/(c−1)] / (N+j)

    to the sum of precisions (McSherry & Najork 2008; He et al. 2018). A group that fits has c = n and m = r.
    Only the group that reaches rank k can be cut: there m is hypergeometric, and it also enters the divisor,
    so that with S the sum over the groups before it

        E[AP@k] = Σ_m P(m) · [S + T(m)] / (R + m),    P(m) = C(r,m) C(n−r,c−m) / C(n,c),

    a term being 0 where R + m = 0. `counts` must sum to at least k.
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, k + 1))])
    end = np.cumsum(counts, axis=1)
    start = end - counts
    hits = np.cumsum(relevant, axis=1) - relevant
    places = np.clip(k - start, 0, counts)
    # Σ_j 1/(N+j) and Σ_j (j−1)/(N+j) over the places of each group.
    reciprocal = harmonic[np.minimum(end, k)] - harmonic[np.minimum(start, k)]
    weighted = places - (start + 1) * reciprocal
    first = (hits + 1) * reciprocal / np.maximum(places, 1)
    second = weighted / np.maximum(places * (places - 1), 1)

    cut = np.argmax(end >= k, axis=1)
    whole = np.arange(counts.shape[1]) < cut[:, None]
    before = np.sum(np.where(whole, relevant * first + relevant * (relevant - 1) * second, 0.0), axis=1)

    at_cut = np.arange(len(counts)), cut
    m, probability = _hypergeometric(counts[at_cut], relevant[at_cut], places[at_cut])
    group = m * first[at_cut][:, None] + m * (m - 1) * second[at_cut][:, None]
    divisor = np.maximum(hits[at_cut][:, None] + m, 1)
    return np.sum(probability * (before[:, None] + group) / divisor, axis=1)


def _hypergeometric(
    total: Int64[np.ndarray, " queries"],
    relevant: Int64[np.ndarray, " queries"],
    drawn: Int64[np.ndarray, " queries"],
) -> tuple[Int64[np.ndarray, "queries support"], Float64[np.ndarray, "queries support"]]:
    """Returns the possible numbers m of relevant images among those drawn, and their probabilities.

    Queries with fewer possible values than others are filled up with larger m of probability 0.

    From ratios of neighboring probabilities, in logs: no factorial of the database's size is ever formed.
    """
    lowest = np.maximum(0, drawn - (total - relevant))
    highest = np.minimum(relevant, drawn)
    m = lowest[:, None] + np.arange(np.max(highest - lowest) + 1)
    inside = m[:, :-1] < highest[:, None]
    n, r, c, low = total[:, None], relevant[:, None], drawn[:, None], m[:, :-1]
    up = np.where(inside, (r - low) * (c - low), 1)
    down = np.where(inside, (low + 1) * (n - r - c + low + 1), 1)
    log_ratio = np.where(inside, np.log(up / down), -np.inf)
    log_probability = np.concatenate([np.zeros((len(m), 1)), np.cumsum(log_ratio, axis=1)], axis=1)
    weight = np.exp(log_probability - log_probability.max(axis=1, keepdims=True))
    return m, weight / weight.sum(axis=1, keepdims=True)


# retrieval.metrics: Retrieval quality of packed codes: MAP, tie-aware MAP, precision and recall, all as means over the queries.
#
# Average precision at k divides by the number of relevant images among the first k and is 0 when there are
# none, as the published numbers of the field do. Two images are relevant to each other when they share a label.


# Query codes, database codes, query labels, database labels.
_Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


T = TypeVar("T")


class Block(NamedTuple):
    """What metrics are computed from, for a block of queries; what was not asked for is empty."""

    ranked: Bool[np.ndarray, "queries k"]  # is the image at each of the first k ranks relevant?
    hits: Int64[np.ndarray, "queries k"]  # how many are, up to and with each rank
    counts: Int64[np.ndarray, "queries radii"]  # database images at each distance 0..bits
    relevant: Int64[np.ndarray, "queries radii"]  # relevant ones among them


def mean_average_precision(
    query_codes: UInt8[np.ndarray, "queries bytes"],
    database_codes: UInt8[np.ndarray, "database bytes"],
    query_labels: Shaped[np.ndarray, "queries ..."],
    database_labels: Shaped[np.ndarray, "database ..."],
    k: int,
) -> float:
    """Returns MAP@k, ties in database order.

    Labels are integers [n], or multi-hot bool or integers [n, classes].

    Raises:
      ValueError: if codes or labels are malformed or do not fit each other, or if k is not in 1..database.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> queries, database = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> one, others = np.array([1]), np.array([1, 2, 1])  # the first and the third are relevant
      >>> round(cib.mean_average_precision(queries, database, one, others, k=3), 4)  # (1/1 + 2/3) / 2
      0.8333
    """
    data = query_codes, database_codes, query_labels, database_labels
    return float(_mean_over_queries(data, _average_precision, k=k)[0])


def tie_aware_map(
    query_codes: UInt8[np.ndarray, "queries bytes"],
    database_codes: UInt8[np.ndarray, "database bytes"],
    query_labels: Shaped[np.ndarray, "queries ..."],
    database_labels: Shaped[np.ndarray, "database ..."],
    k: int,
) -> float:
    """Returns the expectation of MAP@k when images at one distance come in uniformly random order.

    Arguments and errors as for `mean_average_precision`; the formula is in `tie_aware`.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> queries, database = np.array([[0]], np.uint8), np.array([[1], [2]], np.uint8)  # both at distance 1
      >>> cib.tie_aware_map(queries, database, np.array([1]), np.array([1, 2]), k=2)  # (1 + 1/2) / 2
      0.75
    """
    data = query_codes, database_codes, query_labels, database_labels
    return float(_mean_over_queries(data, lambda block: _tie_aware(block, k), k=k, ranks=False, histograms=True)[0])


def precision_at_k(
    query_codes: UInt8[np.ndarray, "queries bytes"],
    database_codes: UInt8[np.ndarray, "database bytes"],
    query_labels: Shaped[np.ndarray, "queries ..."],
    database_labels: Shaped[np.ndarray, "database ..."],
    ks: Sequence[int],
) -> dict[int, float]:
    """Returns, for each k, the mean share of relevant images among the first k, ties in database order.

    Arguments and errors as for `mean_average_precision`.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> queries, database = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> one, others = np.array([1]), np.array([1, 2, 1])  # the first and the third are relevant
      >>> cib.precision_at_k(queries, database, one, others, ks=[1, 2])
      {1: 1.0, 2: 0.5}
    """
    data = query_codes, database_codes, query_labels, database_labels
    _check_ks(ks, len(database_codes))
    means = _mean_over_queries(data, lambda block: _precision_at(block, ks), k=max(ks))
    return dict(zip(ks, means.tolist(), strict=True))


def recall_at_k(
    query_codes: UInt8[np.ndarray, "queries bytes"],
    database_codes: UInt8[np.ndarray, "database bytes"],
    query_labels: Shaped[np.ndarray, "queries ..."],
    database_labels: Shaped[np.ndarray, "database ..."],
    ks: Sequence[int],
) -> dict[int, float]:
    """Returns, for each k, the mean share of a query's relevant images that are among the first k.

    A query without relevant images counts as 0. Ties in database order. Arguments and errors as for
    `mean_average_precision`.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> queries, database = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> one, others = np.array([1]), np.array([1, 2, 1])  # the first and the third are relevant
      >>> cib.recall_at_k(queries, database, one, others, ks=[1, 3])
      {1: 0.5, 3: 1.0}
    """
    data = query_codes, database_codes, query_labels, database_labels
    _check_ks(ks, len(database_codes))
    means = _mean_over_queries(data, lambda block: _recall_at(block, ks), k=max(ks), histograms=True)
    return dict(zip(ks, means.tolist(), strict=True))


def precision_within_radius(
    query_codes: UInt8[np.ndarray, "queries bytes"],
    database_codes: UInt8[np.ndarray, "database bytes"],
    query_labels: Shaped[np.ndarray, "queries ..."],
    database_labels: Shaped[np.ndarray, "database ..."],
    radius: int = 2,
) -> tuple[float, float]:
    """Returns the mean precision of lookups in a Hamming ball, and the share of queries whose ball is empty.

    An empty ball is a failed lookup of precision 0, the field's convention. `radius` is in bits, inclusive;
    other arguments and errors as for `mean_average_precision`, and a ValueError for a negative radius.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> queries, database = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> one, others = np.array([1]), np.array([1, 2, 1])  # the first and the third are relevant
      >>> cib.precision_within_radius(queries, database, one, others, radius=1)
      (0.5, 0.0)
    """
    if radius < 0:
        raise ValueError(f"radius is {radius}, but a Hamming radius is in bits: pass 0 or more.")
    data = query_codes, database_codes, query_labels, database_labels
    precision, empty = _mean_over_queries(
        data, lambda block: _lookup(block, radius), ranks=False, histograms=True
    ).tolist()
    return precision, empty


def precision_recall_curve(
    query_codes: UInt8[np.ndarray, "queries bytes"],
    database_codes: UInt8[np.ndarray, "database bytes"],
    query_labels: Shaped[np.ndarray, "queries ..."],
    database_labels: Shaped[np.ndarray, "database ..."],
) -> tuple[Float64[np.ndarray, " radii"], Float64[np.ndarray, " radii"]]:
    """Returns precision and recall of Hamming balls of radius 0, 1, …, bits, each the mean over queries.

    An empty ball counts as precision 0 and a query without relevant images as recall 0. Arguments and errors
    as for `mean_average_precision`.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> queries, database = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> one, others = np.array([1]), np.array([1, 2, 1])  # the first and the third are relevant
      >>> precision, recall = cib.precision_recall_curve(queries, database, one, others)
      >>> precision[:3].round(3).tolist(), recall[:3].tolist()
      ([1.0, 0.5, 0.667], [0.5, 0.5, 1.0])
    """
    data = query_codes, database_codes, query_labels, database_labels
    precision, recall = np.split(_mean_over_queries(data, _curve, ranks=False, histograms=True), 2)
    return precision, recall


def evaluate(
    query_codes: UInt8[np.ndarray, "queries bytes"],
    database_codes: UInt8[np.ndarray, "database bytes"],
    query_labels: Shaped[np.ndarray, "queries ..."],
    database_labels: Shaped[np.ndarray, "database ..."],
    k: int,
) -> dict[str, Any]:
    """Returns every metric of this module from one pass over the distances, as plain numbers and lists.

    `precision_at_k` holds the lists `k` (the powers of ten up to k, and k), `precision` and `recall`;
    `precision_recall` holds the lists `radius`, `precision` and `recall`. Arguments and errors as for
    `mean_average_precision`.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> queries, database = np.array([[0]], np.uint8), np.array([[0], [1], [3]], np.uint8)
      >>> one, others = np.array([1]), np.array([1, 2, 1])  # the first and the third are relevant
      >>> figures = cib.evaluate(queries, database, one, others, k=3)
      >>> round(figures["map"], 4), figures["precision_at_k"]["k"]
      (0.8333, [1, 3])
    """
    data = query_codes, database_codes, query_labels, database_labels
    ks = sorted({k, *(10**power for power in range(9) if 10**power <= k)})

    def per_query(block: Block) -> Float64[np.ndarray, "queries metrics"]:
        parts = (
            _average_precision(block),
            _tie_aware(block, k),
            _lookup(block, radius=2),
            _precision_at(block, ks),
            _recall_at(block, ks),
            _curve(block),
        )
        return np.concatenate(parts, axis=1)

    means = _mean_over_queries(data, per_query, k=k, histograms=True)
    ends = np.cumsum([1, 1, 1, 1, len(ks), len(ks)])
    (average,), (expected,), (precision,), (empty,), precisions, recalls, curve = np.split(means, ends)
    curve_precision, curve_recall = np.split(curve, 2)
    return {
        "map": float(average),
        "map_tie_aware": float(expected),
        "precision_at_k": {"k": ks, "precision": precisions.tolist(), "recall": recalls.tolist()},
        "precision_radius_2": float(precision),
        "empty_radius_2": float(empty),
        "precision_recall": {
            "radius": list(range(len(curve_precision))),
            "precision": curve_precision.tolist(),
            "recall": curve_recall.tolist(),
        },
        "queries": len(query_codes),
        "database": len(database_codes),
        "k": k,
    }


def _mean_over_queries(
    data: _Data,
    per_query: Callable[[Block], Float64[np.ndarray, "queries metrics"]],
    *,
    k: int = 1,
    ranks: bool = True,
    histograms: bool = False,
) -> Float64[np.ndarray, " metrics"]:
    """Returns the mean over all queries of what `per_query` makes of each block of them."""
    total: Any = 0.0
    for block in each_block(data, lambda block: per_query(block).sum(axis=0), k=k, ranks=ranks, histograms=histograms):
        total = total + block
    return total / len(data[0])


def each_block(
    data: _Data, work: Callable[[Block], T], *, k: int = 1, ranks: bool = True, histograms: bool = False
) -> Iterator[T]:
    """Yields what `work` makes of block after block of queries, in order.

    Nothing is ranked without `ranks`, nothing counted by distance without `histograms`: who asks pays for what is used.

    Raises:
      ValueError: see `mean_average_precision`.
    """
    query_codes, database_codes, query_labels, database_labels = (np.asarray(part) for part in data)
    hamming.validate_codes(query_codes, database_codes, ("query_codes", "database_codes"))
    hamming.validate_k(k, len(database_codes))
    validate_labels(query_codes, database_codes, query_labels, database_labels)
    relevance = Relevance(query_labels, database_labels)
    radii = database_codes.shape[1] * 8 + 1

    def worked(rows: slice, distances: UInt[Array, "height padded"]) -> T:
        queries = rows.stop - rows.start
        ranked, counts = np.zeros((queries, 0), np.bool_), np.zeros((queries, 2, 0), np.int64)
        if ranks:
            ranked = relevance.ranked(rows, hamming.nearest(distances, rows, relevance.size, k))
        if histograms:
            counts = hamming.histograms(distances, rows, relevance, radii)
        return work(Block(ranked, np.cumsum(ranked, axis=1), counts.sum(axis=1), counts[:, 1]))

    yield from over_blocks(query_codes, database_codes, worked)


def _average_precision(block: Block) -> Float64[np.ndarray, "queries 1"]:
    precision = block.hits / np.arange(1, block.hits.shape[1] + 1)
    return np.einsum("qk,qk->q", precision, block.ranked)[:, None] / np.maximum(block.hits[:, -1:], 1)


def _tie_aware(block: Block, k: int) -> Float64[np.ndarray, "queries 1"]:
    return expected_average_precision(block.counts, block.relevant, k)[:, None]


def _precision_at(block: Block, ks: Sequence[int]) -> Float64[np.ndarray, "queries ks"]:
    return block.hits[:, np.asarray(ks) - 1] / np.asarray(ks)


def _recall_at(block: Block, ks: Sequence[int]) -> Float64[np.ndarray, "queries ks"]:
    return block.hits[:, np.asarray(ks) - 1] / np.maximum(block.relevant.sum(axis=1, keepdims=True), 1)


def _lookup(block: Block, radius: int) -> Float64[np.ndarray, "queries 2"]:
    found = block.counts[:, : radius + 1].sum(axis=1)
    hits = block.relevant[:, : radius + 1].sum(axis=1)
    return np.stack([hits / np.maximum(found, 1), found == 0], axis=1)


def _curve(block: Block) -> Float64[np.ndarray, "queries 2*radii"]:
    found = np.cumsum(block.counts, axis=1)
    hits = np.cumsum(block.relevant, axis=1)
    return np.concatenate([hits / np.maximum(found, 1), hits / np.maximum(hits[:, -1:], 1)], axis=1)


def _check_ks(ks: Sequence[int], database: int) -> None:
    if not ks:
        raise ValueError("ks is empty: pass at least one k.")
    for k in ks:
        hamming.validate_k(k, database, name="k in ks")


# retrieval.curves: What a report draws of a ranking, beyond single figures: curves over k and radius, distances, query by query.


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
    parts = list(each_block(data, work, k=k, histograms=True))
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
