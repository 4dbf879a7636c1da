"""Counts in words."""

import pytest

from cib_jax.errors import count


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 photos"), (1, "1 photo"), (2, "2 photos"), (1_000_000, "1,000,000 photos")]
)
def test_a_count_agrees_with_its_noun(number, words):
    assert count(number, "photo") == words
    assert count(number, "class", "classes") == words.replace("photos", "classes").replace("photo", "class")
