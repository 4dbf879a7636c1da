"""Work on all cores: results in order, few of them ahead, and errors where their item stands."""

import pytest

from cib_jax.files import map_in_order


def test_results_come_in_order_and_few_are_ahead():
    started = []

    def slow_first(number):
        started.append(number)
        return -number

    results = map_in_order(slow_first, range(1000))
    assert next(results) == (0, 0)
    assert len(started) < 100
    assert [item for item, _ in results] == list(range(1, 1000))


def test_an_error_comes_in_its_turn():
    results = map_in_order(lambda number: 1 / (3 - number), range(10))
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)
