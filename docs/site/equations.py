"""Equations as MathML, when the site is built: a page shows them without a script and without a network.

`$$…$$` over lines of its own and `$…$` on one line hold LaTeX, as on GitHub.
"""

import re
from typing import Any

# Code, in fences or between backticks, holds dollars of its own and is passed over.
PART = re.compile(r"(?P<code>^```.*?^```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^\s$][^$\n]*)\$", re.S | re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page's text with its equations as MathML.

    Raises:
      ValueError: an equation has a command that is not known, which would show as it was written.
    """
    return PART.sub(_written, markdown)


def _written(part: re.Match) -> str:
    if part["code"]:
        return part["code"]
    from latex2mathml.converter import convert

    latex = (part["block"] or part["inline"]).strip()
    shown = convert(latex, display="block" if part["block"] else "inline")
    if "\\" in shown:
        raise ValueError(f"equation: latex2mathml does not know all of {latex!r}; write it with commands that it knows")
    # A wide equation scrolls by itself on a narrow screen.
    return f'<div style="margin: 1em 0; overflow-x: auto">{shown}</div>' if part["block"] else shown
