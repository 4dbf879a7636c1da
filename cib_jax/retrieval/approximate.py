"""Approximate kinds of index: what FAISS builds for each, with which settings; the same codes give the same index."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from cib_jax.retrieval import faiss_threads
from cib_jax.retrieval.faiss_threads import SearchError

_TRAINING = 64  # codes per list from which the centres of lists are learnt


class Built(NamedTuple):
    """An index of FAISS, and the codes that it searches: its own copy where it keeps them in order, else the given."""

    index: Any
    codes: UInt8[np.ndarray, "n bytes"]


def build(codes: UInt8[np.ndarray, "n bytes"], kind: str, given: Mapping[str, int]) -> Built:
    """Returns the index of a `kind` of KINDS; `given` settings replace the defaults.

    Raises:
      SearchError: the kind or a setting is unknown, or a setting is out of range.
    """
    defaults, make = KINDS[kind]
    settings = defaults(*codes.shape)
    for name, value in given.items():
        if name not in settings:
            raise SearchError(f"{name}: an index of kind {kind!r} has no such setting; it has {', '.join(settings)}")
        least = 0 if name == "nflip" else 1
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise SearchError(f"{name}: {value!r} is no whole number from {least} on; leave it out for its default")
    return make(codes, **(settings | {name: int(value) for name, value in given.items()}))


def search(
    index: Any, queries: UInt8[np.ndarray, "queries bytes"], k: int
) -> tuple[Int32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
    """Returns distances and ids of what an index of `build` finds, ties by id; id −1 where it finds fewer than k."""
    rows = max(1, -(-len(queries) // (4 * faiss_threads.cores())))

    starts = range(0, len(queries), rows)
    found = faiss_threads.in_order(
        functools.partial(index.search, queries[start : start + rows], k) for start in starts
    )
    distances, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
    distances[ids < 0] = np.iinfo(np.int32).max
    order = np.lexsort((ids, distances), axis=-1)
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def _hnsw_settings(n: int, width: int) -> dict[str, int]:
    return {"m": 16, "ef_construction": 40, "ef_search": 64}


def _hnsw(codes: UInt8[np.ndarray, "n bytes"], *, m: int, ef_construction: int, ef_search: int) -> Built:
    if m < 2:
        raise SearchError(f"m: {m} link makes no graph; give 2 or more, 16 by default")
    index = faiss_threads.load().IndexBinaryHNSW(8 * codes.shape[1], m)
    index.hnsw.efConstruction, index.hnsw.efSearch = ef_construction, ef_search
    # One thread: several link codes in an order that no two builds share.
    faiss_threads.in_order([lambda: index.add(codes)])
    return Built(index, _held(index.storage, codes.shape))


def _ivf_settings(n: int, width: int) -> dict[str, int]:
    nlist = 1 << max(0, round(math.log2(n) / 2))
    return {"nlist": nlist, "nprobe": min(nlist, max(8, nlist // 64))}


def _ivf(codes: UInt8[np.ndarray, "n bytes"], *, nlist: int, nprobe: int) -> Built:
    if nlist > len(codes):
        raise SearchError(f"nlist: {nlist} lists are more than there are codes, {len(codes)}; give fewer")
    if nprobe > nlist:
        raise SearchError(f"nprobe: {nprobe} lists are more than nlist, {nlist}; give fewer")
    faiss = faiss_threads.load()
    quantizer = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index = faiss.IndexBinaryIVF(quantizer, 8 * codes.shape[1], nlist)
    quantizer.this.disown()  # it goes with the index
    index.own_fields, index.nprobe = True, nprobe
    index.cp.min_points_per_centroid = 1  # FAISS would print a warning
    some = np.ascontiguousarray(codes[:: max(1, len(codes) // (_TRAINING * nlist))])

    # One thread: sums of floats depend on how many share them.
    faiss_threads.in_order([lambda: index.train(some)])
    index.add(codes)
    return Built(index, codes)


def _mih_settings(n: int, width: int) -> dict[str, int]:
    # Tables of about two codes a bucket, were they spread evenly; a table for every 32 bits.
    nhash = min(max(2, width // 4), 8)
    b = min(max(4, round(math.log2(n)) - 1), 8 * width // nhash, 32)
    return {"nhash": nhash, "b": b, "nflip": 2}


def _mih(codes: UInt8[np.ndarray, "n bytes"], *, nhash: int, b: int, nflip: int) -> Built:
    bits = 8 * codes.shape[1]
    if nhash * b > bits or b > 32:
        raise SearchError(
            f"nhash, b: {nhash} tables of {b} bits do not fit {bits} bits, or 32 a table; give fewer tables or bits"
        )
    if nflip > b:
        raise SearchError(f"nflip: {nflip} bits are more than b, {b}; give fewer")
    index = faiss_threads.load().IndexBinaryMultiHash(bits, nhash, b)
    index.nflip = nflip
    index.add(codes)
    return Built(index, _held(index.storage, codes.shape))


def _held(storage: Any, shape: tuple[int, int]) -> UInt8[np.ndarray, "n bytes"]:
    """Returns FAISS's own codes as an array, so that they are held once; it lives as long as the index does."""
    faiss = faiss_threads.load()
    held = faiss.rev_swig_ptr(faiss.downcast_IndexBinary(storage).xb.data(), shape[0] * shape[1]).reshape(shape)
    held.flags.writeable = False
    return held


KINDS: dict[str, tuple[Callable[[int, int], dict[str, int]], Callable[..., Built]]] = {
    "hnsw": (_hnsw_settings, _hnsw),
    "ivf": (_ivf_settings, _ivf),
    "mih": (_mih_settings, _mih),
}
