"""Figures of many queries, each process taking its share of them."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from cib_jax.devices import processes

Figures = TypeVar("Figures")


def mean(of_queries: Callable[[slice], Figures], count: int) -> Figures:
    """Returns what `of_queries` gives for all of `count` queries, of which it is asked for this process's share.

    Args:
      of_queries: gives figures that are means over the queries of a slice, numbers in dicts and lists of any depth.
      count: of all queries.
    """
    if not processes.several():
        return of_queries(slice(0, count))
    mine = processes.share(count)
    figures = of_queries(mine) if mine.stop > mine.start else None
    told = [json.loads(text) for text in processes.gather_texts(json.dumps([mine.stop - mine.start, figures]))]
    return _mean([(weight / count, theirs) for weight, theirs in told if weight])


def _mean(parts: list[tuple[float, Any]]) -> Any:
    """Returns the mean of what several processes found, each with the weight that its part has in the whole."""
    _, like = parts[0]
    if isinstance(like, dict):
        return {name: _mean([(weight, theirs[name]) for weight, theirs in parts]) for name in like}
    if isinstance(like, list):
        return [_mean([(weight, theirs[at]) for weight, theirs in parts]) for at in range(len(like))]
    if isinstance(like, int):  # of what all of them searched, or a setting
        if any(theirs != like for _, theirs in parts):
            raise AssertionError(f"a count that differs between processes has no mean: {[found for _, found in parts]}")
        return like
    return sum(weight * theirs for weight, theirs in parts)
