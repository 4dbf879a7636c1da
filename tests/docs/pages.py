"""Readers of the documentation's pages, for tests."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def section(name: str, heading: str) -> str:
    """Returns the text between a heading of the second level and the next one."""
    return re.split(r"^## ", text(name).split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def code(part: str) -> list[str]:
    """Returns the fenced Python blocks of a text, in order."""
    return re.findall(r"^```python\n(.*?)^```", part, re.DOTALL | re.MULTILINE)
