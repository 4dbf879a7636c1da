"""Codes as points of a plane, near where codes are near: t-SNE, and which classes to show on it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import sklearn.manifold
from jaxtyping import Float, Int, Shaped, UInt8

from cib_jax import binary
from cib_jax.retrieval import ranking

CLASSES = 10
"""Classes shown at most: more colours and marks cannot be told apart."""


class Shown(NamedTuple):
    """The classes of a picture."""

    labels: Int[np.ndarray, " n"]
    """An index into `names` for each image, −1 for classes that are not shown."""
    names: list[str]


def points(packed: UInt8[np.ndarray, "n bytes"], seed: int) -> Float[np.ndarray, "n 2"] | None:
    """Returns where t-SNE puts codes, from their Hamming distances; None for fewer than 5 items or different codes.

    van der Maaten and Hinton, JMLR 2008, by scikit-learn, perplexity 30 or a third of the items.
    """
    if len(packed) < 5 or len(np.unique(packed, axis=0)) < 5:
        return None
    # The squared Euclidean distance of bits is their Hamming distance.
    bits = binary.ones(packed).astype(np.float32)
    perplexity = min(30.0, (len(packed) - 1) / 3)
    return sklearn.manifold.TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(bits)


def classes(labels: Shaped[np.ndarray, "n ..."], names: Sequence[str]) -> Shown:
    """Returns the most frequent classes, up to ten; of several labels, an image shows its rarest one among them."""
    multi = labels.ndim == 2
    hot = labels.astype(bool) if multi else labels[:, None] == np.arange(int(labels.max()) + 1)
    counts = hot.sum(axis=0)
    most = np.argsort(-counts, kind="stable")[:CLASSES]
    most = most[counts[most] > 0]
    if not len(most):
        return Shown(np.full(len(labels), -1), [])
    shown = np.full(len(labels), -1)
    for number, name in enumerate(most):  # from the most frequent on: a rarer one is written over it
        shown[hot[:, name]] = number
    # By class, not by frequency, as a legend is looked up.
    place = np.argsort(np.argsort(most))
    shown = np.where(shown >= 0, place[shown], -1)
    return Shown(shown, [names[name] if name < len(names) else f"class {name}" for name in np.sort(most)])


def agreement(packed: UInt8[np.ndarray, "n bytes"], labels: Shaped[np.ndarray, "n ..."]) -> float:
    """Returns the share of items that share a label with the nearest other one, the first of several."""
    nearest = ranking.rank(packed, packed, 2)
    own = np.arange(len(packed))
    other = np.where(nearest[:, 0] == own, nearest[:, 1], nearest[:, 0])
    if labels.ndim == 2:
        return float(np.mean((labels.astype(bool) & labels.astype(bool)[other]).any(axis=1)))
    return float(np.mean(labels == labels[other]))
