"""Groups of near-duplicate codes, found without comparing every code with every other."""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, Integer, UInt8

# Bytes of code that are compared at once, and pairs that are collected before their components are joined.
BLOCK_BYTES = 1 << 24
MAX_PAIRS = 1 << 22

Codes = UInt8[np.ndarray, "n bytes"]


def groups(
    codes: Codes, radius: int, advance: Callable[[int], None] = lambda codes: None
) -> list[Int64[np.ndarray, " members"]]:
    """Returns the connected components of two or more codes in the graph that joins codes within `radius` bits.

    Members ascend, and so do the groups' first members. Two codes of one group may be farther apart than `radius`.
    `advance` is called with numbers of codes, whose sum is at most that of all.

    Codes that differ in at most r bits agree in at least one of r + 1 pieces, so that only codes that share a piece
    are compared: with 64 random bits and r = 3, one pair in 16,000. Equal codes are compared once. Memory is a few
    numbers per code and a bounded number of pairs.

    References:
      Norouzi et al., Fast search in Hamming space with multi-index hashing, CVPR 2012.
    """
    distinct, owner = _distinct(codes)
    words = distinct.view(np.uint64) if distinct.shape[1] % 8 == 0 else distinct
    component = np.arange(len(distinct))
    pieces, done = _pieces(8 * distinct.shape[1], radius), 0.0

    def compared(share: float) -> None:
        nonlocal done
        before, done = done, min(done + share * len(codes) / len(pieces), len(codes))
        advance(int(done) - int(before))

    for begin, end in pieces:
        component = _join_buckets(words, component, _buckets(distinct, begin, end), radius, compared)
        if component.max() == 0:
            break
    component = component[owner]
    order, sizes = np.argsort(component, kind="stable"), np.bincount(component)
    found = [order[end - size : end] for size, end in zip(sizes, np.cumsum(sizes), strict=True) if size > 1]
    return sorted(found, key=lambda members: int(members[0]))


def _distinct(codes: Codes) -> tuple[UInt8[np.ndarray, "distinct bytes"], Int64[np.ndarray, " n"]]:
    """Returns the distinct codes, and the position of each code among them."""
    width = codes.shape[1]
    if width <= 8:  # numbers sort many times faster than bytes
        padded = np.zeros((len(codes), 8), np.uint8)
        padded[:, :width] = codes
        rows: np.ndarray = padded.view(np.uint64)
    else:
        rows = codes.view(np.dtype((np.void, width)))
    _, first, owner = np.unique(rows[:, 0], return_index=True, return_inverse=True)
    return codes[first], owner


def _pieces(bits: int, radius: int) -> list[tuple[int, int]]:
    """Returns the first bit of each piece of a code, and the one after its last."""
    count = radius + 1
    # Pieces too short to separate codes: an empty one, in which every pair is compared once, is cheaper.
    if count > bits or count >= 1 << bits // count:
        return [(0, 0)]
    return list(itertools.pairwise(bits * number // count for number in range(count + 1)))


def _buckets(codes: Codes, begin: int, end: int) -> Int64[np.ndarray, " n"]:
    """Returns a bucket number per code, the same for codes that agree in a piece."""
    if begin == end:
        return np.zeros(len(codes), np.int64)
    piece = codes[:, begin // 8 : -(-end // 8)].copy()
    piece[:, 0] &= 0xFF >> begin % 8
    piece[:, -1] &= 0xFF << (-end % 8) & 0xFF
    return _distinct(piece)[1]


def _join_buckets(
    words: Integer[np.ndarray, "n words"],
    component: Int64[np.ndarray, " n"],
    buckets: Int64[np.ndarray, " n"],
    radius: int,
    compared: Callable[[float], None],
) -> Int64[np.ndarray, " n"]:
    """Returns the components after joining those of codes in one bucket within the radius.

    Codes are sorted by bucket. Step s compares every code with the s-th one after it, if that is in the same bucket.
    `compared` is called with shares of the work.
    """
    order = np.argsort(buckets, kind="stable")
    sizes = np.bincount(buckets)
    left = np.cumsum(sizes)[buckets[order]] - 1 - np.arange(len(order))  # codes after each in its bucket
    words, most, total = words[order], max(1, BLOCK_BYTES // words[0].nbytes), max(1, int(left.sum()))
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    count, step, active = 0, 1, np.flatnonzero(left >= 1)
    while len(active):
        for start in range(0, len(active), most):
            here = active[start : start + most]
            compared(len(here) / total)
            distances = np.bitwise_count(words[here] ^ words[here + step]).sum(axis=1, dtype=np.int32)
            near = here[distances <= radius]
            one, other = component[order[near]], component[order[near + step]]
            apart = one != other
            if apart.any():
                pairs.append((one[apart], other[apart]))
                count += int(apart.sum())
            if count > MAX_PAIRS:
                component, pairs, count = _merge(component, pairs), [], 0
        step += 1
        active = active[left[active] >= step]
    return _merge(component, pairs) if pairs else component


def _merge(component: Int64[np.ndarray, " n"], pairs: list[tuple[np.ndarray, np.ndarray]]) -> Int64[np.ndarray, " n"]:
    """Returns the components after joining those of each pair."""
    count = int(component.max()) + 1
    one, other = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    from scipy import sparse  # takes a quarter of a second, which a search would wait for
    from scipy.sparse import csgraph

    graph = sparse.coo_array((np.ones(len(one), np.bool_), (one, other)), shape=(count, count))
    return csgraph.connected_components(graph, directed=False)[1].astype(np.int64)[component]
