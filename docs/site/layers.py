"""Draws docs/layers.svg, the layers of cib_jax, and finds the imports between its parts.

python docs/site/layers.py
"""

import ast
import html
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "cib_jax"
PICTURE = ROOT / "docs" / "layers.svg"

LAYERS = (
    ("command line", ("cli",)),
    ("modes", ("commands",)),
    ("one run, one call, one page", ("runs", "fitting", "storage", "web")),
    ("a trained encoder", ("inference", "baselines")),
    ("config, figures", ("config", "report")),
    ("steps and loop", ("training",)),
    ("networks, losses, ranking, data", ("models", "losses", "retrieval", "data")),
    ("functions of arrays", ("augment", "codes", "diffusion", "exported")),
    ("devices and hosts", ("distributed",)),
    ("names and settings", ("random_streams", "deprecation", "configs", "version")),
    ("used by all", ("errors", "files", "hint", "console")),
)
"""From top to bottom: a part imports parts of lower layers only. A part is a folder of the package, or a file."""

PURE = ("augment", "codes", "losses", "diffusion", "baselines")
"""Parts without files, logs or state."""

ENTRY_POINTS = ("__init__", "__main__", "jobs")

WIDTH, ROW, BOX, LEFT = 860, 46, 32, 230


def part_of(path: pathlib.Path) -> str:
    """Returns the part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: pathlib.Path) -> Iterator[str]:
    """Yields the modules of the package that a file imports, anywhere in it, without "cib_jax."."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "cib_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cib_jax."):
            yield from (f"{node.module}.{alias.name}".removeprefix("cib_jax.") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("cib_jax.") for alias in node.names if "cib_jax." in alias.name)


def uses() -> dict[str, set[str]]:
    """Returns the parts that each part imports."""
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if part_of(path) not in ENTRY_POINTS]
    found: dict[str, set[str]] = {part_of(path): set() for path in files}
    for path in files:
        found[part_of(path)] |= {module.split(".")[0] for module in imported(path)} & found.keys() - {part_of(path)}
    return found


def picture() -> str:
    """Returns the drawing, as SVG."""
    height = len(LAYERS) * ROW + 60
    shapes = []
    for number, (title, parts) in enumerate(LAYERS):
        top, width = 16 + number * ROW, (WIDTH - LEFT - 20) / len(parts)
        shapes.append(_text(20, top + 21, title, anchor="start", size=13, fill="#666"))
        for column, part in enumerate(parts):
            fill = "#d9ecd9" if part in PURE else "#ececec" if number >= len(LAYERS) - 2 else "#dbe7f5"
            left = LEFT + column * width
            shapes.append(
                f'<rect x="{left:.0f}" y="{top}" width="{width - 8:.0f}" height="{BOX}" rx="5" fill="{fill}" '
                'stroke="#888"/>'
            )
            name = f"{part}/" if (PACKAGE / part).is_dir() else f"{part}.py"
            shapes.append(_text(left + (width - 8) / 2, top + 21, name))
    legend = "Each part imports only parts of lower layers. Green: pure functions of arrays."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
            "<title>The layers of cib_jax</title>",
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff"/>',
            *shapes,
            _text(20, height - 18, legend, anchor="start", size=12),
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, words: str, *, anchor: str = "middle", size: int = 14, fill: str = "#222") -> str:
    place = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{fill}">{html.escape(words)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
