"""Every message on docs/troubleshooting.md is one that the program can give."""

import ast
import pathlib
import re

import pytest

from tests.docs import pages

ROOT = pathlib.Path(__file__).parents[2]


def templates() -> list[str]:
    """Every string of the program, "…" where a value goes in."""
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


def told(name: str) -> list[str]:
    """The first cells, in backticks, of the rows of tables whose first column is of messages."""
    messages = []
    for table in re.findall(r"^\| message.*\n\|.*\n((?:\|.*\n)+)", pages.text(name), re.MULTILINE):
        messages += [re.match(r"\| `([^`]+)` \|", row).group(1) for row in table.splitlines()]
    return messages


def fits(message: str, template: str) -> bool:
    """Whether the template can give a sentence that begins so: "…" on either side stands for anything."""
    pattern = "".join(r".*" if part == "…" else re.escape(part) for part in re.split("(…)", message))
    return re.match(pattern, template) is not None


@pytest.mark.parametrize("message", told("troubleshooting.md"))
def test_the_message_is_in_the_source(message):
    whole = [template for template in TEMPLATES if fits(message, template)]
    # Where a sentence is put together of two strings, such as a field's name and what its value must be.
    place, _, rest = message.partition(": … ")
    parts = [template for template in TEMPLATES if rest and template.startswith(rest)]
    name = place.removeprefix("config.")
    assert whole or (parts and name in TEMPLATES), message


def test_there_are_enough_messages_to_be_worth_a_test():
    assert len(told("troubleshooting.md")) > 35
