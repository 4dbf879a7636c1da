"""Checks of data errors by class, field and the values that they name, not by their sentences."""

import contextlib

import pytest

from cib_jax.errors import DataError


@contextlib.contextmanager
def raises(field: str, *values: object):
    """Expects a DataError in one line that blames `field` and contains every one of `values`."""
    with pytest.raises(DataError) as caught:
        yield
    message = str(caught.value)
    assert caught.value.field == field and message.startswith(f"{field}: ") and "\n" not in message, message
    for value in values:
        assert str(value) in message, message
