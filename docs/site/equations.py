"""MkDocs hook that converts equations to MathML, so that pages need no script and no network.

`$$…$$` on separate lines and `$…$` within a line contain LaTeX, as on GitHub.
"""

import re
from typing import Any

# Code, in fences or between backticks, may contain dollar signs and is skipped.
PART = re.compile(r"(?P<code>^```.*?^```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^\s$][^$\n]*)\$", re.S | re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page's text with its equations as MathML.

    Raises:
      ValueError: An equation has a command that latex2mathml does not know and would leave unchanged.
    """
    return PART.sub(_written, markdown)


def _written(part: re.Match) -> str:
    if part["code"]:
        return part["code"]
    from latex2mathml.converter import convert

    latex = (part["block"] or part["inline"]).strip()
    shown = convert(latex, display="block" if part["block"] else "inline")
    if "\\" in shown:
        raise ValueError(f"equation: latex2mathml does not know all commands of {latex!r}; use others")
    # Markdown would make a paragraph of its own from a line that begins with <math>.
    # On a narrow screen, a wide equation scrolls without the rest of the page.
    return f'<div style="margin: 1em 0; overflow-x: auto">{shown}</div>' if part["block"] else f"<span>{shown}</span>"
