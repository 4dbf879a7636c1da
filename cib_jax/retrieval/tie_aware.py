"""The expectation of average precision over random order within ties, in closed form."""

import numpy as np
from jaxtyping import Float64, Int64


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

    From ratios of neighbouring probabilities, in logs: no factorial of the database's size is ever formed.
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
