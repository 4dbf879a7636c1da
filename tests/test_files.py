"""Work on all cores in order, and the wording of errors."""

import pytest

from cib_jax.files import did_you_mean, first_line, map_in_order, short_reason


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


def test_reasons_are_one_line():
    assert first_line(ValueError("  a\nb")) == "a"
    assert first_line(KeyError()) == "KeyError"
    assert short_reason(OSError(28, "No space left")) == "no space left"
    assert short_reason(OSError("Some\ntext")) == "Some"


def test_a_hint_names_only_close_choices():
    assert did_you_mean("tain", ["train", "test"]) == "did you mean train?"
    assert did_you_mean("bat", ["bath", "cat", "zebra"], 2) == "did you mean bath or cat?"
    assert did_you_mean("xyz", ["train"]) == ""
