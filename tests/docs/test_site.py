"""The MkDocs hooks: links that leave docs/, and equations."""

import importlib.util
import pathlib
import re
from xml.etree import ElementTree

import pytest

from tests.docs import pages


def hook(name: str, event: str = "on_page_markdown"):
    spec = importlib.util.spec_from_file_location(name, pages.DOCS / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, event)


def test_link_out_of_docs_becomes_the_file_name():
    shown = hook("outside")("See [the page](data.md#a) and [routes.py](../cib_jax/web/routes.py).")
    assert shown == "See [the page](data.md#a) and `cib_jax/web/routes.py`."


def test_link_to_the_repository_requests_nothing():
    """Checked on the theme's own template, with the attribute that makes its script query GitHub."""
    material = pytest.importorskip("material", reason="it comes with the extra docs")
    (template,) = pathlib.Path(material.__file__).parent.glob("templates/partials/source.html")
    page = template.read_text()
    assert 'data-md-component="source"' in page
    assert "data-md-component" not in hook("outside", "on_post_page")(page)


def test_linked_files_exist():
    for page in pages.DOCS.glob("*.md"):
        for path in re.findall(r"\]\(\.\./([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            assert (pages.DOCS.parent / path).exists(), f"{page.name}: {path}"


def test_code_keeps_its_dollars():
    text = "`$HOME` and\n\n```\necho $A $B\n```\n"
    assert hook("equations")(text) == text


def test_an_equation_is_mathml():
    pytest.importorskip("latex2mathml", reason="it comes with the extra docs")
    shown = hook("equations")("With $p_1$:\n\n$$\n\\frac{a}{b}\n$$\n")
    inline = shown[shown.index("<math") : shown.index("</math>") + 7]
    assert "".join(ElementTree.fromstring(inline).itertext()) == "p1"
    block = ElementTree.fromstring(shown[shown.index("<div") :].strip())
    fraction = block.find(".//{http://www.w3.org/1998/Math/MathML}mfrac")
    assert ["".join(part.itertext()) for part in fraction] == ["a", "b"]


def test_an_equation_at_the_start_of_a_line_stays_in_its_paragraph():
    pytest.importorskip("latex2mathml", reason="it comes with the extra docs")
    markdown = pytest.importorskip("markdown", reason="it comes with the extra docs")
    shown = markdown.markdown(hook("equations")("It takes\n$b = a$, as before."))
    assert shown.count("<p>") == 1 and shown.endswith(", as before.</p>")


def test_unknown_latex_command_is_an_error():
    pytest.importorskip("latex2mathml", reason="it comes with the extra docs")
    with pytest.raises(ValueError, match="nonsense"):
        hook("equations")(r"$a \nonsense b$")
