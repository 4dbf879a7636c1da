"""Writes docs/files.md out of the first sentence of each file in cib_jax/: the question that the file answers.

python docs/site/files.py
"""

import ast
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "cib_jax"
PAGE = ROOT / "docs" / "files.md"

HEAD = """# The files

What each file is for, in its own words: this page is made of their first sentences by `python docs/site/files.py`.
[Architecture](architecture.md) says who may call whom.
"""


def question(path: pathlib.Path) -> str:
    """Returns the first paragraph of a file's docstring on one line, "" where there is none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def folders() -> Iterator[tuple[pathlib.Path, list[pathlib.Path]]]:
    """Yields each folder of the package that holds code, with its files but the one that speaks for the folder."""
    for initial in sorted(PACKAGE.rglob("__init__.py")):
        yield initial.parent, sorted(path for path in initial.parent.glob("*.py") if path != initial)


def page() -> str:
    """Returns the page, in Markdown."""
    parts = [HEAD]
    for folder, files in folders():
        parts.append(f"## {folder.relative_to(ROOT).as_posix()}\n")
        parts.append(f"{_text(question(folder / '__init__.py'))}\n")
        if files:
            rows = [
                f"| [{path.name}](../{path.relative_to(ROOT).as_posix()}) | {_text(question(path))} |" for path in files
            ]
            parts.append("\n".join(["| file | what for |", "| --- | --- |", *rows, ""]))
    return "\n".join(parts)


def _text(sentence: str) -> str:
    sentence = re.sub(r"(https://[^\s)]+[^\s).;,])", r"<\1>", sentence)
    return sentence.replace("|", "&#124;").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
