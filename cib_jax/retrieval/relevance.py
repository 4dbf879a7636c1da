"""Which database images are relevant to a query: those that share a label with it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer, Shaped, UInt32

from cib_jax.retrieval.distances import as_words


class Relevance:
    """Whether database images are relevant to queries, asked by rank or for a whole block of queries.

    With integer labels [n], images of the query's class are; with multi-hot labels [n, classes], images that share at
    least one class with it. Both are kept as words of bits: a class number, or a set of classes.
    """

    def __init__(
        self, query_labels: Shaped[np.ndarray, "queries ..."], database_labels: Shaped[np.ndarray, "database ..."]
    ):
        self.size = len(database_labels)
        self._single = query_labels.ndim == 1
        both = np.concatenate([query_labels, database_labels])
        if self._single:
            # From 1 on, so that a filling of 0 is of no query's class.
            words = (np.unique(both, return_inverse=True)[1] + 1).astype(np.uint32)[None]
        else:
            words = as_words(np.packbits(both.astype(np.bool_), axis=1))
        self._queries, self._database = words[:, : len(query_labels)], words[:, len(query_labels) :]
        self._on_device: UInt32[Array, "words padded"] | None = None

    def ranked(self, rows: slice, ranks: Integer[np.ndarray, "queries k"]) -> Bool[np.ndarray, "queries k"]:
        """Returns whether the images at `ranks` are relevant to the queries `rows`."""
        queries = self._queries[:, rows, None]
        if self._single:
            return self._database[0][ranks] == queries[0]
        common = self._database[0][ranks] & queries[0]
        for query, column in zip(queries[1:], self._database[1:], strict=True):
            common |= column[ranks] & query
        return common != 0

    def whole(self, rows: slice, height: int, padded: int) -> Bool[Array, "height padded"]:
        """Returns the same for all images, filled up with rows and columns that mean nothing."""
        if self._on_device is None:
            self._on_device = jnp.asarray(np.pad(self._database, ((0, 0), (0, padded - self.size))))
        queries = self._queries[:, rows]
        queries = np.pad(queries, ((0, 0), (0, height - queries.shape[1])))
        return (_equal if self._single else _share)(queries, self._on_device)


@jax.jit
def _equal(queries: UInt32[Array, "1 queries"], database: UInt32[Array, "1 n"]) -> Bool[Array, "queries n"]:
    return queries[0][:, None] == database[0]


@jax.jit
def _share(queries: UInt32[Array, "words queries"], database: UInt32[Array, "words n"]) -> Bool[Array, "queries n"]:
    return jnp.any(queries[:, :, None] & database[:, None] != 0, axis=0)


def check_labels(
    query_codes: np.ndarray, database_codes: np.ndarray, query_labels: np.ndarray, database_labels: np.ndarray
) -> None:
    """Raises a ValueError unless both labels are of one kind and there is one per code."""
    for codes, labels, side in (
        (query_codes, query_labels, "query"),
        (database_codes, database_labels, "database"),
    ):
        _check_kind(labels, f"{side}_labels")
        if len(labels) != len(codes):
            raise ValueError(
                f"{side}_labels has shape {labels.shape} and {side}_codes {codes.shape}, but both need one "
                "row per image: pass the labels of the images that were hashed."
            )
    if query_labels.shape[1:] != database_labels.shape[1:]:
        raise ValueError(
            f"query_labels has shape {query_labels.shape} and database_labels {database_labels.shape}, but "
            "both must be class numbers [n] or multi-hot [n, classes] over the same classes: align them."
        )


def _check_kind(labels: np.ndarray, name: str) -> None:
    single = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    multi = labels.ndim == 2 and (labels.dtype == np.bool_ or np.issubdtype(labels.dtype, np.integer))
    if not (single or multi):
        raise ValueError(
            f"{name} must be integers [n] or multi-hot bool or integers [n, classes], not {labels.dtype} of "
            f"shape {labels.shape}: convert the labels."
        )
    if multi and (labels.shape[1] == 0 or np.any((labels != 0) & (labels != 1))):
        raise ValueError(
            f"{name} of shape {labels.shape} is not multi-hot, since it needs at least one class and only 0 "
            "and 1 as values: pass class numbers as [n]."
        )
