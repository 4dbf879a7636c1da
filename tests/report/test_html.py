"""Page of a report: arguments are text, never markup."""

from cib_jax.report.html import Grid, Picture, Section, render


def test_a_page_shows_markup_as_text():
    page = render(
        "<script>alert(1)</script>",
        "a & b",
        [Grid("t", ("h",), [("<b>x</b>", "y")])],
        [Section("empty", []), Section("one", [Picture("p", b"png", 'say "hi"')])],
        notes=["<i>note</i>"],
        config="{}",
    )
    assert "<script>" not in page and "<b>x</b>" not in page and "<i>note" not in page
    assert "&lt;script&gt;" in page and "a &amp; b" in page
    assert "empty" not in page and 'alt="say &#34;hi&#34;"' in page
