"""Links that leave docs/, which a site has no page for, become the name of the file in the repository."""

import re
from typing import Any

LINK = re.compile(r"\[[^\]\n]*\]\(\.\./([^)#\s]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page's text with `[text](../path)` as `path`; a link to a missing page stays, and is refused."""
    return LINK.sub(r"`\1`", markdown)
