"""Generator of docs/configuration.md, from the fields of configs/default.py and their comments.

python docs/site/configuration.py
"""

import ast
import io
import pathlib
import re
import tokenize
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = ROOT / "configs" / "default.py"
PAGE = ROOT / "docs" / "configuration.md"

HEAD = """# Configuration

Every field of an experiment, with its default and meaning. This page is generated from
[configs/default.py](../configs/default.py) by `python docs/site/configuration.py`. A file in `configs/` lists only the
fields that differ. Any field can be set on the command line, `--config.data.dir=DIR`; an unknown field, or a value that
cannot work, is rejected before anything starts ([troubleshooting](troubleshooting.md#invalid-configurations)).
"""

TITLES = {
    "seed": "A run",
    "backbone": "Network",
    "objective": "Method",
    "batch_size": "Optimization",
    "encode_batch": "Encoding",
    "teacher": "Teacher",
    "fine_tune": "Fine-tuning",
    "data": "Data",
    "train": "Training",
    "cache": "Cache",
    "log": "Metric logging",
    "report": "Report",
    "compare": "Comparison",
    "tune": "Tuning",
}
"""Title of a section, by the part of its fields' names before the dot, or by its first field if they have no dot."""


class Field(NamedTuple):
    """One field of the source."""

    name: str
    default: str
    meaning: str


class Group(NamedTuple):
    """Fields of one paragraph."""

    heading: str
    """The comment above the paragraph, or ""."""
    fields: list[Field]


def read(source: str) -> list[Group]:
    """Returns the groups of a file that sets fields of `c` in `get_config`, in the order of the file.

    A comment after a field belongs to the field, and so does one directly above it within a paragraph. A comment that
    begins a paragraph belongs to the paragraph, and is the meaning of its first field if that has no other comment.
    """
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    groups: list[Group] = []
    heading, fresh = "", False
    for node in function.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        first = node.lineno
        while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
            first -= 1
        above = " ".join(comments[line] for line in range(first, node.lineno))
        begins = not lines[first - 2].strip()
        if begins:
            heading, fresh = above, True
            above = ""
        name = ast.unparse(node.targets[0]).removeprefix("c.")
        if ast.unparse(node.value) == "ml_collections.ConfigDict()":
            continue
        assert node.end_lineno
        behind = " ".join(comments[line] for line in range(node.lineno, node.end_lineno + 1) if line in comments)
        if fresh:
            groups.append(Group(heading, []))
        if not (above or behind) and fresh:
            behind = heading
        fresh = False
        groups[-1].fields.append(Field(name, repr(ast.literal_eval(node.value)), " ".join((above, behind)).strip()))
    return groups


def page(groups: list[Group]) -> str:
    """Returns the page, in Markdown."""
    parts, section = [HEAD], None
    for group in groups:
        now = group.fields[0].name.partition(".")[0]
        if now != section:
            parts.append(f"## {TITLES[now]}\n")
        section = now
        heading = group.heading.removeprefix(f"{TITLES[now]}.").removeprefix(f"{TITLES[now]}: ")
        if heading and heading != group.fields[0].meaning:
            parts.append(f"{_text(heading)}\n")
        rows = [f"| `{field.name}` | {_code(field.default)} | {_text(field.meaning)} |" for field in group.fields]
        parts.append("\n".join(["| field | default | meaning |", "| --- | --- | --- |", *rows, ""]))
    return "\n".join(parts)


def _code(value: str) -> str:
    # An entity, since some Markdown renderers show a backslash inside code.
    return f"<code>{value.replace('|', '&#124;')}</code>"


def _text(comment: str) -> str:
    comment = re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", comment)
    comment = re.sub(r"(https://[^\s)]+[^\s).;,])", r"<\1>", comment)
    return comment.replace("|", "&#124;").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page(read(SOURCE.read_text(encoding="utf-8"))), encoding="utf-8")
