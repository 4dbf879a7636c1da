"""An index of packed codes, for whoever searches: k nearest, all within a radius, near-duplicates, re-ranking."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64, UInt8

from cib_jax.retrieval import approximate, asymmetric, exact_search, faiss_threads, near_duplicates
from cib_jax.retrieval.exact_search import Hits
from cib_jax.retrieval.faiss_threads import SearchError
from cib_jax.retrieval.ranking import check_codes, check_k, check_packed

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
        may miss some of the nearest: "ivf" sorts them into lists around centres, "mih" hashes pieces of them, "hnsw"
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
        if kind != EXACT and kind not in approximate.KINDS:
            raise SearchError(f"kind: {kind!r} is not one of {EXACT}, {', '.join(approximate.KINDS)}")
        check_packed(codes, "codes")
        faiss_threads.load()
        held = _contiguous(codes)
        if kind != EXACT:
            built = approximate.build(held, kind, settings)
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
        check_k(k, len(self))
        if self._approximate is None:
            return exact_search.nearest(self.codes, queries, k)
        return approximate.search(self._approximate, queries, k)

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
        return asymmetric.rerank(self.codes, logits, ids.astype(np.int64))

    def _checked(self, queries: UInt8[np.ndarray, "queries bytes"]) -> UInt8[np.ndarray, "queries bytes"]:
        check_codes(queries, self.codes, ("queries", "the index"))
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
