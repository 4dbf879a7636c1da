"""Metrics as plain loops over images, as their definitions read, and data to compare on."""

from itertools import permutations, product

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import cdist


def distance(a, b):
    return sum(bin(int(x) ^ int(y)).count("1") for x, y in zip(a, b, strict=True))


def is_relevant(a, b):
    return bool(a == b) if np.ndim(a) == 0 else any(x and y for x, y in zip(a, b, strict=True))


def per_query(data):
    """Yields the distances and relevances of the database for each query."""
    query_codes, database_codes, query_labels, database_labels = data
    for distances, label in zip(distances_of(query_codes, database_codes).tolist(), query_labels, strict=True):
        yield distances, [is_relevant(label, other) for other in database_labels.tolist()]


def in_order(distances, relevance):
    """The relevances by distance, ties in database order: Python's sort is stable."""
    return [relevance[i] for i in sorted(range(len(distances)), key=distances.__getitem__)]


def average_precision(ranked, k):
    hits, total = 0, 0.0
    for position, relevant in enumerate(ranked[:k], start=1):
        if relevant:
            hits += 1
            total += hits / position
    return total / hits if hits else 0.0


def enumerated_average_precision(distances, relevance, k):
    """The mean of AP@k over every order of every tie group, image by image."""
    groups = [[r for d, r in zip(distances, relevance, strict=True) if d == g] for g in sorted(set(distances))]
    orders = product(*(permutations(group) for group in groups))
    return np.mean([average_precision([r for group in order for r in group], k) for order in orders])


def reference_map(data, k):
    return np.mean([average_precision(in_order(d, r), k) for d, r in per_query(data)])


def reference_precision(data, k):
    return np.mean([sum(in_order(d, r)[:k]) / k for d, r in per_query(data)])


def reference_recall(data, k):
    return np.mean([sum(in_order(d, r)[:k]) / max(sum(r), 1) for d, r in per_query(data)])


def reference_ball(data, radius):
    """Precision, recall and emptiness of the ball of that radius, each the mean over queries."""
    rows = []
    for distances, relevance in per_query(data):
        inside = [r for d, r in zip(distances, relevance, strict=True) if d <= radius]
        precision = sum(inside) / len(inside) if inside else 0.0
        recall = sum(inside) / sum(relevance) if any(relevance) else 0.0
        rows.append((precision, recall, not inside))
    return np.mean(rows, axis=0)


@st.composite
def tied_data(draw, largest=25):
    """Codes from few byte values and labels of few classes, single or multi-hot, some of them empty."""
    q, n, width = draw(st.integers(1, 4)), draw(st.integers(1, largest)), draw(st.sampled_from([1, 2, 9]))
    codes = hnp.arrays(np.uint8, (q + n, width), elements=st.sampled_from([0, 1, 2, 7, 255]))
    single = hnp.arrays(np.int64, q + n, elements=st.sampled_from([-1, 0, 1, 1000]))
    multi = hnp.arrays(np.bool_, (q + n, draw(st.sampled_from([1, 3, 12]))))
    drawn, labels = draw(codes), draw(st.one_of(single, multi))
    return drawn[:q], drawn[q:], labels[:q], labels[q:]


def random_data(q=6, n=80, width=2, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (q + n, width), dtype=np.uint8)
    labels = rng.integers(0, classes, q + n)
    return codes[:q], codes[q:], labels[:q], labels[q:]


def distances_of(queries, codes):
    """SciPy's, of unpacked bits."""
    return cdist(np.unpackbits(queries, axis=1), np.unpackbits(codes, axis=1), "cityblock").astype(int)


def random_codes(n, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, width), np.uint8)


def clustered_codes(n, width, seed=0, centers=8):
    """A sixteenth of the bits around a few centers turned, so that ties and near neighbors abound."""
    rng = np.random.default_rng(seed)
    flips = rng.integers(0, 256, (4, n, width), np.uint8)
    return random_codes(centers, width, seed)[rng.integers(0, centers, n)] ^ np.bitwise_and.reduce(flips)


@st.composite
def tied_codes(draw):
    """Queries, codes of the same width, from few byte values, and k."""
    width = draw(st.sampled_from([1, 2, 3, 5, 8, 9, 16, 20, 32]))
    byte = st.sampled_from([0, 1, 3, 255])
    queries = draw(hnp.arrays(np.uint8, (draw(st.integers(1, 5)), width), elements=byte))
    codes = draw(hnp.arrays(np.uint8, (draw(st.integers(1, 70)), width), elements=byte))
    return queries, codes, draw(st.integers(1, len(codes)))
