"""docs/files.md has the first sentence of each file in cib_jax/."""

import importlib.util

from tests.docs import pages


def script():
    path = pages.DOCS / "site" / "files.py"
    spec = importlib.util.spec_from_file_location("files_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    """`python docs/site/files.py` changes nothing."""
    assert pages.text("files.md") == script().page()


def test_every_file_has_a_docstring():
    made = script()
    undocumented = [path for path in made.PACKAGE.rglob("*.py") if not made.first_sentence(path)]
    assert undocumented == []
