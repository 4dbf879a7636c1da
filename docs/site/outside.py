"""What leaves docs/: links to files become their names, and the link to the repository asks nothing of its host."""

import re
from typing import Any

LINK = re.compile(r"\[[^\]\n]*\]\(\.\./([^)#\s]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page's text with `[text](../path)` as `path`; a link to a missing page stays, and is refused."""
    return LINK.sub(r"`\1`", markdown)


def on_post_page(output: str, **_: Any) -> str:
    """Returns a page on which the link to the repository is a link alone: the theme would count its stars at GitHub."""
    return output.replace(' data-md-component="source"', "")
