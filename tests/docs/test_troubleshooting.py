"""Every message listed in docs/troubleshooting.md occurs in the source."""

import ast
import pathlib
import re

import pytest

from tests.docs import pages

ROOT = pathlib.Path(__file__).parents[2]


def templates() -> list[str]:
    """Returns every string in the program, with "…" for formatted values."""
    found = []
    for path in (ROOT / "run.py", *sorted((ROOT / "cib_jax").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEMPLATES = templates()


def messages(name: str) -> list[str]:
    """Returns the messages, in backticks, of all tables with a column "message" on a page."""
    found = []
    for table in re.findall(r"^\| message.*\n\|.*\n((?:\|.*\n)+)", pages.text(name), re.MULTILINE):
        found += [re.match(r"\| `([^`]+)` \|", row).group(1) for row in table.splitlines()]
    return found


def fits(message: str, template: str) -> bool:
    """Returns whether the template can produce a sentence with this beginning; "…" on either side matches anything."""
    pattern = "".join(r".*" if part == "…" else re.escape(part) for part in re.split("(…)", message))
    return re.match(pattern, template) is not None


@pytest.mark.parametrize("message", messages("troubleshooting.md"))
def test_the_message_is_in_the_source(message):
    # Some messages are composed of two strings: the name of a field, flag or file, and the rest.
    composed = re.match(r"((?:config\.|--)?[\w.]+|…)(: | must be | )(.*)", message)
    beginnings = [message]
    if composed and (composed[1] == "…" or {composed[1], re.sub(r"^(config\.|--)", "", composed[1])} & {*TEMPLATES}):
        beginnings += [composed[3], f"… {composed[3]}"]
    assert any(fits(beginning, template) for beginning in beginnings for template in TEMPLATES), message


def test_page_lists_messages():
    assert len(messages("troubleshooting.md")) > 35
