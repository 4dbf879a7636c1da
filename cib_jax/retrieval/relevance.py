"""Which database images are relevant to a query: those that share a label with it."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Shaped

from cib_jax.retrieval.ranking import as_words, shares_bit


def relevance_rows(
    query_labels: Shaped[np.ndarray, "queries ..."], database_labels: Shaped[np.ndarray, "database ..."]
) -> Iterator[Bool[np.ndarray, " database"]]:
    """Yields, query by query, which database images are relevant to it.

    With integer labels [n], images of the query's class are; with multi-hot labels [n, classes], images that
    share at least one class with it.
    """
    if query_labels.ndim == 1:
        # Class numbers are packed into the narrowest integer that counts them, which compares fastest.
        classes, numbers = np.unique(np.concatenate([query_labels, database_labels]), return_inverse=True)
        numbers = numbers.astype(np.min_scalar_type(len(classes)))
        database = numbers[len(query_labels) :]
        for query in numbers[: len(query_labels)]:
            yield database == query
    else:
        columns = as_words(np.packbits(database_labels.astype(np.bool_), axis=1))
        for row in as_words(np.packbits(query_labels.astype(np.bool_), axis=1)).T:
            yield shares_bit(row, columns)


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
