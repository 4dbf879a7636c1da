"""The documentation's pages, as tests read them."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def section(name: str, heading: str) -> str:
    """What stands under a heading of the second level, up to the next one."""
    return re.split(r"^## ", text(name).split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def code(part: str) -> list[str]:
    """The fenced Python of a part of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", part, re.DOTALL | re.MULTILINE)
