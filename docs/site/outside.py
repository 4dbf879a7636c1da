"""MkDocs hook for links that leave docs/: links to source files become their names, the repository is not queried."""

import re
from typing import Any

LINK = re.compile(r"\[[^\]\n]*\]\(\.\./([^)#\s]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page's text with `[text](../path)` replaced by `path`; other links are checked by MkDocs."""
    return LINK.sub(r"`\1`", markdown)


def on_post_page(output: str, **_: Any) -> str:
    """Returns a page with a plain link to the repository; the theme's script would query GitHub for stars."""
    return output.replace(' data-md-component="source"', "")
