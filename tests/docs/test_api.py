"""docs/api.md lists every public name once, and docs/method.md links to existing functions."""

import re

import cib_jax as cib
from cib_jax.losses import OBJECTIVES
from tests.docs import pages


def test_every_public_name_is_listed_once():
    assert sorted(re.findall(r"^::: cib_jax\.(\w+)$", pages.text("api.md"), re.MULTILINE)) == sorted(cib.__all__)


def test_the_method_links_to_public_names():
    linked = re.findall(r"\[`(\w+)`\]\(api\.md#cib_jax\.(\w+)\)", pages.text("method.md"))
    assert len(linked) > 8
    assert all(shown == name and name in cib.__all__ for shown, name in linked)


def test_the_method_has_every_objective():
    table = pages.section("method.md", "Objective")
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(OBJECTIVES)
    for name, contrasted, added in re.findall(r"^\| `(\w+)` \| (\w+).*? \| (yes|no) \|", table, re.MULTILINE):
        assert OBJECTIVES[name].binary == (contrasted == "codes")
        assert OBJECTIVES[name].bottleneck == (added == "yes")
