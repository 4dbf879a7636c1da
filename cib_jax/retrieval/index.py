"""Index of packed codes: k nearest, exact or approximate, all within a radius, near-duplicates, reranking."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64, Integer, UInt8

from cib_jax.codes import byte_count, ones
from cib_jax.console import library_bar
from cib_jax.errors import SearchError, whole_number
from cib_jax.files import core_count, count
from cib_jax.retrieval import exact_search, near_duplicates
from cib_jax.retrieval.exact_search import Hits
from cib_jax.retrieval.hamming import validate_codes, validate_k, validate_packed

EXACT = "exact"
# Codes per list from which the centers of lists are learned.
_TRAINING = 64
ADDED = 4096
"""Codes that are added to an approximate index at a time, between two steps of its progress bar."""
MANY = 100_000
"""Codes from which the bar is shown at once."""
MANY_QUERIES = 1000
"""Queries from which on a search may show a bar."""
# Logits that are compared at once in `rerank`.
_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """Packed codes that can be searched; an id is a position among them. Any number of threads may search at once.

    index = Index.of(hasher.encode(images))
    distances, ids = index.search(hasher.encode(queries), k=10)

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> index = cib.Index.of(np.array([[0], [1], [3]], np.uint8))
      >>> distances, ids = index.search(np.array([[2]], np.uint8), k=2)
      >>> distances.tolist(), ids.tolist()  # 0 and 3 differ from 2 in one bit each
      ([[1, 1]], [[0, 2]])
    """

    codes: UInt8[np.ndarray, "n bytes"]
    """The codes, read-only. May share memory with the array passed to `of`, which must not change then."""
    kind: str
    _approximate: Any = None

    @classmethod
    def of(
        cls, codes: UInt8[np.ndarray, "n bytes"], kind: str = EXACT, *, progress: bool = True, **settings: int
    ) -> "Index":
        """Returns the index of codes [n, bytes].

        "exact" compares every code and copies none; a memory map larger than memory works. The other kinds compare few
        codes and may miss some of the nearest: "ivf" sorts codes into lists around centers, "mih" hashes pieces of
        them, "hnsw" links near ones. "mih" and "hnsw" keep a copy of the codes in place of the array passed, "ivf" one
        beside it.

        Args:
          codes: Packed codes, as from `Hasher.encode`.
          kind: Kind of the index: exact, hnsw, ivf or mih.
          progress: Whether building another kind than "exact" shows a progress bar in terminals and notebooks.
          **settings: FAISS's settings of the kind; defaults depend on the number of codes. hnsw: m links per code,
            ef_construction and ef_search candidates followed; ivf: nlist lists, nprobe of them searched; mih: nhash
            tables of b bits each, looked up with up to nflip bits flipped.

        Raises:
          SearchError: FAISS is not installed, or the kind or a setting is unknown or out of range.
          UserError: The codes are not packed uint8, or empty.
        """
        if kind != EXACT and kind not in KINDS:
            raise SearchError(f"kind must be one of {EXACT}, {', '.join(KINDS)}, got {kind!r}", field="kind")
        validate_packed(codes, "codes")
        exact_search.load_faiss()
        codes = _contiguous(codes)
        defaults, build = KINDS.get(kind, (lambda *_: {}, lambda codes, add: (codes, None)))
        known = defaults(*codes.shape)
        for name, value in settings.items():
            if name not in known:
                raise SearchError(
                    f"{name} is not a setting of an index of kind {kind!r}, which has {', '.join(known) or 'none'}; "
                    "leave it out",
                    field=name,
                )
            known[name] = whole_number(
                name, value, {"nflip": 0, "m": 2}.get(name, 1), SearchError, "leave it out for its default"
            )
        # Learning the lists of "ivf" takes seconds for many codes, before any of them is added.
        shown, delay = progress and kind != EXACT, 0 if len(codes) > MANY else 1
        with library_bar("Building the index", len(codes), shown, "codes", delay=delay) as advance:

            def add(index: Any) -> None:
                for start in range(0, len(codes), ADDED):
                    index.add(codes[start : start + ADDED])
                    advance(len(codes[start : start + ADDED]))

            codes, approximate = build(codes, add, **known)
        return cls(codes, kind, approximate)

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        return f"Index({count(len(self), 'code')} of {self.bits} bits, {self.kind})"

    @property
    def bits(self) -> int:
        """Number of bits of a code."""
        return 8 * self.codes.shape[1]

    def search(
        self, queries: UInt8[np.ndarray, "queries bytes"], k: int, *, progress: bool = True
    ) -> tuple[Int32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
        """Returns Hamming distances and ids of each query's k nearest codes, nearest first, ties in database order.

        An approximate kind may find fewer than k: then the rest are ids −1 at distance 2³¹ − 1.

        Args:
          queries: Packed codes of the queries.
          k: Number of hits for each query.
          progress: Whether a search for thousands of queries shows a progress bar in terminals and notebooks.

        Raises:
          UserError: The queries are not packed uint8, are empty or of another length, or k is not in 1..n.
        """
        validate_codes(queries, self.codes, ("queries", "the index"))
        validate_k(k, len(self))
        queries = _contiguous(queries)
        with _search_bar(len(queries), progress) as advance:
            if self._approximate is None:
                return exact_search.nearest(self.codes, queries, k, advance)
            # A few blocks for each core, so that none waits long for the last one.
            rows = max(1, min(MANY_QUERIES, -(-len(queries) // (4 * core_count()))))
            calls = (
                functools.partial(self._approximate.search, queries[start : start + rows], k)
                for start in range(0, len(queries), rows)
            )
            found = exact_search.run_in_order(calls, lambda hits: advance(len(hits[0])))
        distances, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
        distances[ids < 0] = np.iinfo(np.int32).max
        # FAISS leaves hits at the same distance in any order.
        order = np.lexsort((ids, distances), axis=-1)
        return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)

    def within(self, queries: UInt8[np.ndarray, "queries bytes"], radius: int, *, progress: bool = True) -> list[Hits]:
        """Returns, for each query, all codes that differ from it in at most `radius` bits, nearest first, ties by id.

        Exact for every kind. `progress` is that of `search`.

        Raises:
          UserError: The queries are not packed uint8, are empty or of another length, or the radius is negative.
        """
        validate_codes(queries, self.codes, ("queries", "the index"))
        radius = self._radius(radius)
        with _search_bar(len(queries), progress) as advance:
            return exact_search.within(self.codes, _contiguous(queries), radius, advance)

    def groups(self, radius: int, *, progress: bool = True) -> list[Int64[np.ndarray, " members"]]:
        """Returns the groups of two or more codes that are joined by chains of codes within `radius` bits.

        Ids ascend in each group, and so do the groups' first ids. Exact for every kind. Fast for small radii, up to
        about bits / 16; beyond, nearly every pair is compared. Work of more than a second shows a bar if `progress`.

        Raises:
          UserError: The radius is negative.
        """
        with library_bar("Comparing codes", len(self), progress, "codes", delay=1) as advance:
            return near_duplicates.groups(self.codes, self._radius(radius), advance)

    def rerank(
        self, logits: Float[np.ndarray, "queries bits"], ids: Integer[np.ndarray, "queries k"]
    ) -> tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
        """Returns the hits of `search` by asymmetric distance: the sum of |logit| over the bits that differ.

        The Hamming distance counts a bit of which the query is certain like one that nearly went the other way; this
        distance does not, and breaks most ties. Remaining ties keep their order.

        Args:
          logits: Logits of the queries, as from `Hasher.logits`.
          ids: Ids of their hits; −1 for no hit, at distance infinity.

        Raises:
          SearchError: The shapes do not fit each other or the codes, a logit is not finite, or an id is not in −1..n−1.

        References:
          Gordo et al., Asymmetric distances for binary embeddings, CVPR 2011.
        """
        logits, ids = np.asarray(logits), np.asarray(ids)
        fits = logits.ndim == 2 and byte_count(logits.shape[1]) == self.codes.shape[1]
        if not fits or not np.issubdtype(logits.dtype, np.floating):
            raise SearchError(
                f"logits must be floats of shape [queries, {self.bits}], got {logits.dtype} of shape {logits.shape}; "
                "take those of the Hasher that made the codes",
                field="logits",
            )
        if not np.isfinite(logits).all():
            raise SearchError(
                "logits must be finite, but some are not; check the encoder's parameters and inputs", field="logits"
            )
        if ids.ndim != 2 or len(ids) != len(logits) or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
            raise SearchError(
                f"ids must be whole numbers of shape [{len(logits)}, k], one row for each row of logits, got "
                f"{ids.dtype} of shape {ids.shape}; pass those that search returned for these queries",
                field="ids",
            )
        if ids.min() < -1 or ids.max() >= len(self):
            raise SearchError(
                f"ids must be from -1 to {len(self) - 1}, got {ids.min()} to {ids.max()}; pass those that search of "
                "this index returned",
                field="ids",
            )
        ids, distances = ids.astype(np.int64), np.empty(ids.shape, np.float32)
        rows = max(1, _BLOCK // (ids.shape[1] * self.bits))
        for start in range(0, len(ids), rows):
            block = slice(start, start + rows)
            bits = ones(self.codes[ids[block]], logits.shape[1]).view(np.bool_)
            query = logits[block].astype(np.float32)[:, None]
            differing = np.where(bits == (query > 0), np.float32(0), np.abs(query))
            distances[block] = differing.sum(axis=-1, dtype=np.float64)
        distances[ids < 0] = np.inf
        order = np.argsort(distances, axis=1, kind="stable")
        return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)

    def _radius(self, radius: int) -> int:
        return min(whole_number("radius", radius, 0, SearchError, "give it in bits"), self.bits)


def _search_bar(queries: int, progress: bool) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    if progress and queries > MANY_QUERIES:
        return library_bar("Searching", queries, unit="queries", delay=1)
    return contextlib.nullcontext(lambda queries: None)  # even a bar that is not shown takes a tenth of a millisecond


def parse_kind(text: str) -> tuple[str, dict[str, int]]:
    """Returns the kind of an index and its settings, as `Index.of` takes them, from words such as "ivf nprobe=64"."""
    kind, *words = text.split() or [""]
    settings = {}
    for word in words:
        name, _, value = word.partition("=")
        if not value.isdecimal() or name in ("codes", "kind", "progress"):  # arguments of `Index.of` that are none
            raise SearchError(
                f"--kind must be like 'ivf nlist=4096 nprobe=64', got {word!r} as a setting", field="--kind"
            )
        settings[name] = int(value)
    return kind, settings


def _contiguous(codes: UInt8[np.ndarray, "n bytes"]) -> UInt8[np.ndarray, "n bytes"]:
    # A view of its own, so that the caller's array stays writeable; of a memory map too, a class unknown to FAISS.
    codes = np.ascontiguousarray(codes).view(np.ndarray).view()
    codes.flags.writeable = False
    return codes


# Approximate kinds. The same codes give the same index. Each function returns the codes that the index searches (its
# own copy if FAISS keeps them in order, else those given) and FAISS's index.

Built = tuple[UInt8[np.ndarray, "n bytes"], Any]
Add = Callable[[Any], None]  # adds the codes to FAISS's index


def _hnsw(codes: UInt8[np.ndarray, "n bytes"], add: Add, *, m: int, ef_construction: int, ef_search: int) -> Built:
    index = exact_search.load_faiss().IndexBinaryHNSW(8 * codes.shape[1], m)
    index.hnsw.efConstruction, index.hnsw.efSearch = ef_construction, ef_search
    # In one thread: several link codes in an order that no two builds share.
    exact_search.run_in_order([lambda: add(index)])
    return _stored_codes(index, codes.shape), index


def _ivf_settings(n: int, width: int) -> dict[str, int]:
    nlist = 1 << max(0, round(math.log2(n) / 2))
    return {"nlist": nlist, "nprobe": min(nlist, max(8, nlist // 64))}


def _ivf(codes: UInt8[np.ndarray, "n bytes"], add: Add, *, nlist: int, nprobe: int) -> Built:
    if nlist > len(codes):
        raise SearchError(f"nlist must be at most {len(codes)}, the number of codes, got {nlist}", field="nlist")
    if nprobe > nlist:
        raise SearchError(f"nprobe must be at most nlist, {nlist}, got {nprobe}", field="nprobe")
    faiss = exact_search.load_faiss()
    quantizer = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index = faiss.IndexBinaryIVF(quantizer, 8 * codes.shape[1], nlist)
    quantizer.this.disown()  # `index` frees it
    index.own_fields, index.nprobe = True, nprobe
    index.cp.min_points_per_centroid = 1  # FAISS would print a warning
    sample = np.ascontiguousarray(codes[:: max(1, len(codes) // (_TRAINING * nlist))])
    # In one thread: sums of floats depend on the number of threads that share them.
    exact_search.run_in_order([lambda: index.train(sample)])
    add(index)
    return codes, index


def _mih_settings(n: int, width: int) -> dict[str, int]:
    # A table for every 32 bits, with about two codes a bucket if codes were spread evenly.
    nhash = min(max(2, width // 4), 8)
    b = min(max(4, round(math.log2(n)) - 1), 8 * width // nhash, 32)
    return {"nhash": nhash, "b": b, "nflip": 2}


def _mih(codes: UInt8[np.ndarray, "n bytes"], add: Add, *, nhash: int, b: int, nflip: int) -> Built:
    bits = 8 * codes.shape[1]
    if nhash * b > bits or b > 32:
        raise SearchError(
            f"nhash tables of b bits must fit {bits} bits, with b at most 32, got {nhash} tables of {b} bits; give "
            "fewer tables or bits",
            field="nhash",
        )
    if nflip > b:
        raise SearchError(f"nflip must be at most b, {b}, got {nflip}", field="nflip")
    index = exact_search.load_faiss().IndexBinaryMultiHash(bits, nhash, b)
    index.nflip = nflip
    add(index)
    return _stored_codes(index, codes.shape), index


def _stored_codes(index: Any, shape: tuple[int, int]) -> UInt8[np.ndarray, "n bytes"]:
    """Returns FAISS's own copy of the codes as an array without copying; valid as long as `index` is."""
    faiss = exact_search.load_faiss()
    data = faiss.downcast_IndexBinary(index.storage).xb.data()
    codes = faiss.rev_swig_ptr(data, shape[0] * shape[1]).reshape(shape)
    codes.flags.writeable = False
    return codes


KINDS: dict[str, tuple[Callable[[int, int], dict[str, int]], Callable[..., Built]]] = {
    "hnsw": (lambda n, width: {"m": 16, "ef_construction": 40, "ef_search": 64}, _hnsw),
    "ivf": (_ivf_settings, _ivf),
    "mih": (_mih_settings, _mih),
}
"""Approximate kinds: default settings by number and width of codes, and the function that builds the index."""
