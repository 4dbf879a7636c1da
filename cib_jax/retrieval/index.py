"""First hits in a finer order: how strongly a query's logits contradict a code, not only in how many bits."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64, UInt8

from cib_jax.codes import ones
from cib_jax.errors import SearchError
from cib_jax.retrieval import exact_search, near_duplicates
from cib_jax.retrieval.exact_search import Hits
from cib_jax.retrieval.hamming import validate_codes, validate_k, validate_packed

# retrieval.asymmetric: First hits in a finer order: how strongly a query's logits contradict a code, not only in how many bits.


_BLOCK = 1 << 22  # logits compared at once


def rerank(
    codes: UInt8[np.ndarray, "n bytes"], logits: Float[np.ndarray, "queries bits"], ids: Int64[np.ndarray, "queries k"]
) -> tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
    """Returns the hits of each query by asymmetric distance, nearest first, ties in the order in which they came.

    The distance is Σ_j |l_j| over the bits j in which the code differs from that of the logits l, which is the Hamming
    distance with bits weighted by how sure the query is of them (Gordo et al., Asymmetric distances for binary
    embeddings, CVPR 2011). An id of −1 stands for no hit, at infinity.
    """
    distances = np.empty(ids.shape, np.float32)
    rows = max(1, _BLOCK // (ids.shape[1] * logits.shape[1]))
    for start in range(0, len(ids), rows):
        block = slice(start, start + rows)
        bits = ones(codes[ids[block]]).view(np.bool_)
        query = logits[block].astype(np.float32)[:, None]
        distances[block] = np.where(bits == (query > 0), np.float32(0), np.abs(query)).sum(axis=-1, dtype=np.float64)
    distances[ids < 0] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


# retrieval.approximate: Approximate kinds of index: what FAISS builds for each, with which settings; the same codes give the same index.


_TRAINING = 64  # codes per list from which the centers of lists are learnt


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
    rows = max(1, -(-len(queries) // (4 * exact_search.core_count())))

    starts = range(0, len(queries), rows)
    found = exact_search.in_order(functools.partial(index.search, queries[start : start + rows], k) for start in starts)
    distances, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
    distances[ids < 0] = np.iinfo(np.int32).max
    order = np.lexsort((ids, distances), axis=-1)
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def _hnsw_settings(n: int, width: int) -> dict[str, int]:
    return {"m": 16, "ef_construction": 40, "ef_search": 64}


def _hnsw(codes: UInt8[np.ndarray, "n bytes"], *, m: int, ef_construction: int, ef_search: int) -> Built:
    if m < 2:
        raise SearchError(f"m: {m} link makes no graph; give 2 or more, 16 by default")
    index = exact_search.load_faiss().IndexBinaryHNSW(8 * codes.shape[1], m)
    index.hnsw.efConstruction, index.hnsw.efSearch = ef_construction, ef_search
    # One thread: several link codes in an order that no two builds share.
    exact_search.in_order([lambda: index.add(codes)])
    return Built(index, _held(index.storage, codes.shape))


def _ivf_settings(n: int, width: int) -> dict[str, int]:
    nlist = 1 << max(0, round(math.log2(n) / 2))
    return {"nlist": nlist, "nprobe": min(nlist, max(8, nlist // 64))}


def _ivf(codes: UInt8[np.ndarray, "n bytes"], *, nlist: int, nprobe: int) -> Built:
    if nlist > len(codes):
        raise SearchError(f"nlist: {nlist} lists are more than there are codes, {len(codes)}; give fewer")
    if nprobe > nlist:
        raise SearchError(f"nprobe: {nprobe} lists are more than nlist, {nlist}; give fewer")
    faiss = exact_search.load_faiss()
    quantizer = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index = faiss.IndexBinaryIVF(quantizer, 8 * codes.shape[1], nlist)
    quantizer.this.disown()  # it goes with the index
    index.own_fields, index.nprobe = True, nprobe
    index.cp.min_points_per_centroid = 1  # FAISS would print a warning
    some = np.ascontiguousarray(codes[:: max(1, len(codes) // (_TRAINING * nlist))])

    # One thread: sums of floats depend on how many share them.
    exact_search.in_order([lambda: index.train(some)])
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
    index = exact_search.load_faiss().IndexBinaryMultiHash(bits, nhash, b)
    index.nflip = nflip
    index.add(codes)
    return Built(index, _held(index.storage, codes.shape))


def _held(storage: Any, shape: tuple[int, int]) -> UInt8[np.ndarray, "n bytes"]:
    """Returns FAISS's own codes as an array, so that they are held once; it lives as long as the index does."""
    faiss = exact_search.load_faiss()
    held = faiss.rev_swig_ptr(faiss.downcast_IndexBinary(storage).xb.data(), shape[0] * shape[1]).reshape(shape)
    held.flags.writeable = False
    return held


KINDS: dict[str, tuple[Callable[[int, int], dict[str, int]], Callable[..., Built]]] = {
    "hnsw": (_hnsw_settings, _hnsw),
    "ivf": (_ivf_settings, _ivf),
    "mih": (_mih_settings, _mih),
}


# retrieval.index: An index of packed codes, for whoever searches: k nearest, all within a radius, near-duplicates, re-ranking.


EXACT = "exact"


def kind_of(text: str) -> tuple[str, dict[str, int]]:
    """Returns the kind of an index and its settings, as `Index.of` takes them, of words such as "ivf nprobe=64".

    Raises:
      SearchError: a word is none.
    """
    kind, *words = text.split() or [""]
    settings = {}
    for word in words:
        name, _, value = word.partition("=")
        if not value.isdecimal():
            raise SearchError(f"--kind: {word!r} is no setting; write them as in 'ivf nlist=4096 nprobe=64'")
        settings[name] = int(value)
    return kind, settings


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
    """Read-only; the array that the index was made of where nothing had to be copied, so do not change that either."""
    kind: str
    _approximate: Any = None

    @classmethod
    def of(cls, codes: UInt8[np.ndarray, "n bytes"], kind: str = EXACT, **settings: int) -> "Index":
        """Returns the index of codes [n, bits / 8].

        "exact" looks at every code and copies none; a memory map larger than memory will do. The others look at few and
        may miss some of the nearest: "ivf" sorts them into lists around centers, "mih" hashes pieces of them, "hnsw"
        links near ones. "mih" and "hnsw" copy the codes, so that the caller's can go; "ivf" has its own beside the
        caller's.

        Args:
          codes: packed, as from `Hasher.encode`.
          kind: exact | hnsw | ivf | mih.
          settings: of the kind, each chosen by the number of codes where it is left out, as FAISS names them.
            hnsw: m links per code, ef_construction and ef_search candidates followed; ivf: nlist lists, nprobe of them
            looked at; mih: nhash tables of b bits each, looked up with up to nflip bits turned.

        Raises:
          SearchError: FAISS is not installed, the kind or a setting is unknown, or a setting is out of range.
          ValueError: the codes are not packed uint8, or empty.
        """
        if kind != EXACT and kind not in KINDS:
            raise SearchError(f"kind: {kind!r} is not one of {EXACT}, {', '.join(KINDS)}")
        validate_packed(codes, "codes")
        exact_search.load_faiss()
        held = _contiguous(codes)
        if kind != EXACT:
            built = build(held, kind, settings)
            return cls(built.codes, kind, built.index)
        if settings:
            raise SearchError(f"{next(iter(settings))}: an index of kind {EXACT!r} has no settings; leave it out")
        return cls(held, kind)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def bits(self) -> int:
        """The length of a code."""
        return 8 * self.codes.shape[1]

    def search(
        self, queries: UInt8[np.ndarray, "queries bytes"], k: int
    ) -> tuple[Int32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
        """Returns Hamming distances and ids of each query's k nearest codes, nearest first, ties in database order.

        Of an approximate kind: of the nearest that it finds, and where it finds fewer, ids −1 at distance 2³¹ − 1.

        Raises:
          ValueError: the queries are not packed uint8, are empty, or of another length, or k is not in 1..n.
        """
        queries = self._checked(queries)
        validate_k(k, len(self))
        if self._approximate is None:
            return exact_search.nearest(self.codes, queries, k)
        return search(self._approximate, queries, k)

    def within(self, queries: UInt8[np.ndarray, "queries bytes"], radius: int) -> list[Hits]:
        """Returns, for each query, all codes that differ from it in at most `radius` bits, nearest first, ties by id.

        Exact, whatever the kind.

        Raises:
          ValueError: the queries are not packed uint8, are empty, or of another length, or the radius is negative.
        """
        queries = self._checked(queries)
        return exact_search.within(self.codes, queries, self._radius(radius))

    def groups(self, radius: int) -> list[Int64[np.ndarray, " members"]]:
        """Returns the groups of codes that chains of codes within `radius` bits of each other join, of two or more.

        Ids ascend in each group, and so do the groups' first ids. Exact, whatever the kind. Fast for small radii, up to
        bits / 16 or so; beyond, nearly every pair is compared.

        Raises:
          ValueError: the radius is negative.
        """
        return near_duplicates.groups(self.codes, self._radius(radius))

    def rerank(
        self, logits: Float[np.ndarray, "queries bits"], ids: Int64[np.ndarray, "queries k"]
    ) -> tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
        """Returns the hits of `search` by asymmetric distance: the sum of |logit| over the bits that differ.

        The Hamming distance takes a bit of which the query is sure like one that nearly went the other way; this does
        not, and breaks most ties. What is left of them keeps its order.

        Args:
          logits: of the queries, `Hasher.logits`.
          ids: of their hits; −1 stands for none.

        Raises:
          ValueError: the shapes do not fit each other or the codes, a logit is not finite, or an id is not in −1..n−1.
        """
        logits, ids = np.asarray(logits), np.asarray(ids)
        if logits.ndim != 2 or logits.shape[1] != self.bits or not np.issubdtype(logits.dtype, np.floating):
            raise ValueError(
                f"logits must be floats of shape [queries, {self.bits}], not {logits.dtype} of shape {logits.shape}: "
                "take those of the Hasher whose codes are in the index"
            )
        if not np.isfinite(logits).all():
            raise ValueError("logits has values that are not finite: the encoder's parameters or inputs are damaged")
        if ids.ndim != 2 or len(ids) != len(logits) or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"ids must be whole numbers of shape [{len(logits)}, k], one row for each row of logits, not "
                f"{ids.dtype} of shape {ids.shape}: pass what search returned for these queries"
            )
        if ids.min() < -1 or ids.max() >= len(self):
            raise ValueError(
                f"ids go from {ids.min()} to {ids.max()}, but the index holds {len(self)} codes: pass what its own "
                "search returned"
            )
        return rerank(self.codes, logits, ids.astype(np.int64))

    def _checked(self, queries: UInt8[np.ndarray, "queries bytes"]) -> UInt8[np.ndarray, "queries bytes"]:
        validate_codes(queries, self.codes, ("queries", "the index"))
        return _contiguous(queries)

    def _radius(self, radius: int) -> int:
        if isinstance(radius, bool) or not isinstance(radius, int | np.integer) or radius < 0:
            raise ValueError(f"radius is {radius!r}, but must be a whole number of bits, 0 or more")
        return min(int(radius), self.bits)


def _contiguous(codes: UInt8[np.ndarray, "n bytes"]) -> UInt8[np.ndarray, "n bytes"]:
    # A view, whose being read-only is not the caller's business; of a memory map too, which FAISS does not know.
    held = np.ascontiguousarray(codes).view(np.ndarray).view()
    held.flags.writeable = False
    return held
