"""Writes docs/files.md from the first sentences of the files in cib_jax/.

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

The first sentence of each file's docstring, collected by `python docs/site/files.py`. [Architecture](architecture.md)
describes the layers and which of them may import which.
"""


def first_sentence(path: pathlib.Path) -> str:
    """Returns the first paragraph of a file's docstring on one line, "" if it has none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def folders() -> Iterator[tuple[pathlib.Path, list[pathlib.Path]]]:
    """Yields each folder of the package with code, and its files except `__init__.py`."""
    for initial in sorted(PACKAGE.rglob("__init__.py")):
        yield initial.parent, sorted(path for path in initial.parent.glob("*.py") if path != initial)


def page() -> str:
    """Returns the page, in Markdown."""
    parts = [HEAD]
    for folder, files in folders():
        parts.append(f"## {folder.relative_to(ROOT).as_posix()}\n")
        parts.append(f"{_text(first_sentence(folder / '__init__.py'))}\n")
        if files:
            rows = [(f"[{path.name}](../{path.relative_to(ROOT).as_posix()})", first_sentence(path)) for path in files]
            lines = [f"| {link} | {_text(sentence)} |" for link, sentence in rows]
            parts.append("\n".join(["| file | content |", "| --- | --- |", *lines, ""]))
    return "\n".join(parts)


def _text(sentence: str) -> str:
    sentence = re.sub(r"(https://[^\s)]+[^\s).;,])", r"<\1>", sentence)
    return sentence.replace("|", "&#124;").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
