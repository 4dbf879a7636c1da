"""docs/files.md is what the files of cib_jax/ say of themselves."""

import importlib.util

from tests.docs import pages


def script():
    path = pages.DOCS / "site" / "files.py"
    spec = importlib.util.spec_from_file_location("files_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    """`python docs/site/files.py` would write what is there."""
    assert pages.text("files.md") == script().page()


def test_every_file_says_what_it_is_for():
    made = script()
    silent = [path for path in made.PACKAGE.rglob("*.py") if not made.question(path)]
    assert silent == []
