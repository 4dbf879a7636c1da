"""docs/configuration.md lists every field of configs/default.py with its default and a meaning."""

import ast
import html
import importlib.util
import re

from cib_jax.config.schema import flatten
from configs import default
from tests.docs import pages


def script():
    path = pages.DOCS / "site" / "configuration.py"
    spec = importlib.util.spec_from_file_location("configuration_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> list[tuple[str, str, str]]:
    return re.findall(r"^\| `([\w.]+)` \| <code>(.*?)</code> \| (.*) \|$", pages.text("configuration.md"), re.MULTILINE)


def test_every_field_is_listed_once_with_its_default():
    listed = {name: ast.literal_eval(html.unescape(value)) for name, value, _ in rows()}
    assert len(listed) == len(rows())
    assert listed == flatten(default.get_config())


def test_every_field_has_a_meaning():
    assert [name for name, _, meaning in rows() if len(meaning.strip()) < 5] == []


def test_the_page_is_up_to_date():
    """`python docs/site/configuration.py` changes nothing."""
    made = script()
    assert pages.text("configuration.md") == made.page(made.read(made.SOURCE.read_text(encoding="utf-8")))


SOURCE = """
def get_config():
    c = ml_collections.ConfigDict()

    # Of a paragraph.
    c.first = 1
    c.second = "a|b"  # its own
    # Above it,
    # on two lines.
    c.third = (
        ""  # and behind it
    )

    c.inner = ml_collections.ConfigDict()
    c.inner.fourth = -1  # alone
    return c
"""


def test_comments_are_assigned_to_their_fields():
    groups = script().read(SOURCE)
    assert [group.heading for group in groups] == ["Of a paragraph.", ""]
    assert [[tuple(field) for field in group.fields] for group in groups] == [
        [
            ("first", "1", "Of a paragraph."),
            ("second", "'a|b'", "its own"),
            ("third", "''", "Above it, on two lines. and behind it"),
        ],
        [("inner.fourth", "-1", "alone")],
    ]
