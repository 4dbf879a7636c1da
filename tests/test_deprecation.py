"""Old keywords of public functions: they work for a release, with a warning."""

import jax.numpy as jnp
import optax
import pytest

import cib_jax as cib
from cib_jax.deprecation import renamed_keywords


@renamed_keywords(colour="color", grey="gray")
def paint(color, *, gray=0):
    """Returns its arguments."""
    return color, gray


def test_an_old_keyword_is_passed_on_with_a_warning():
    with pytest.warns(DeprecationWarning, match="colour is now color"):
        assert paint(colour=1) == (1, 0)
    with pytest.warns(DeprecationWarning, match="grey is now gray"):
        assert paint(1, grey=2) == (1, 2)


def test_new_keywords_give_no_warning(recwarn):
    assert paint(color=1, gray=2) == paint(1, gray=2) == (1, 2)
    assert not recwarn.list


def test_both_at_once_are_refused():
    with pytest.raises(TypeError, match="colour"):
        paint(color=1, colour=1)


def test_a_state_takes_the_old_name_of_its_optimizer():
    params = {"head": jnp.ones(2)}
    with pytest.warns(DeprecationWarning, match="optimiser is now optimizer"):
        assert int(cib.create_train_state(params, optimiser=optax.sgd(0.1)).step) == 0
