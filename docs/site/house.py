"""Draws docs/house.svg: the rooms of cib_jax/, floor by floor, and who calls whom, as the imports say.

python docs/site/house.py
"""

import ast
import html
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "cib_jax"
PICTURE = ROOT / "docs" / "house.svg"

GROUND = ("atomic", "errors", "program", "configs")
"""What every room may stand on: drawn as one bar, without arrows."""

FACES = ("__init__", "__main__")
"""They hand names on and start the door; no room stands on them."""

KINDS = {
    "pure: no file, no state": ("views", "binary", "contrast", "objective", "encoder", "diffusion", "baselines"),
    "pure but a file or two": ("backbones", "retrieval"),
    "disks and devices": ("data", "devices", "training", "corpus", "collection", "hashing", "report", "web"),
    "where the parts meet": ("jobs", "command", "fitting"),
}
COLORS = ("#d9ecd9", "#eef5d8", "#dbe7f5", "#fbe3cf", "#ececec")
"""Of each kind, and of what is of none: words and settings."""

WIDTH, ROW, BOX = 860, 66, 34


class Box(NamedTuple):
    """Where a room is drawn, in pixels."""

    left: float
    top: float
    width: float


def room_of(path: pathlib.Path) -> str:
    """Returns the room that a file lies in: a folder of the package, or itself."""
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


def arrows() -> dict[str, set[str]]:
    """Returns the rooms that each room uses."""
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if room_of(path) not in FACES]
    uses: dict[str, set[str]] = {room_of(path): set() for path in files}
    for path in files:
        uses[room_of(path)] |= {module.split(".")[0] for module in imported(path)} & uses.keys() - {room_of(path)}
    return uses


def floors(uses: dict[str, set[str]]) -> dict[str, int]:
    """Returns each room's floor, 0 being the ground: above all that it uses, and close under those that use it.

    Raises:
      ValueError: some rooms use each other in a circle; the message names them.
    """
    lowest = {room: 0 for room in GROUND if room in uses}
    left = uses.keys() - lowest.keys()
    while left:
        ready = {room for room in left if uses[room] <= lowest.keys()}
        if not ready:
            raise ValueError(f"rooms that use each other in a circle, or stand on such: {', '.join(sorted(left))}")
        lowest |= {room: 1 + max((lowest[under] for under in uses[room]), default=0) for room in ready}
        left -= ready
    found: dict[str, int] = {}
    for room in sorted(lowest, key=lambda room: -lowest[room]):
        over = [found[user] for user in found if room in uses[user]]
        found[room] = 0 if room in GROUND else min(over, default=lowest[room] + 1) - 1
    return found


def direct(uses: dict[str, set[str]], room: str) -> set[str]:
    """Returns what a room uses and none of the rooms that it uses does, so that the picture has few arrows."""

    def below(start: str) -> set[str]:
        return set().union(*({under} | below(under) for under in uses[start]), set())

    wanted = uses[room] - {*GROUND}
    return {under for under in wanted if not any(under in below(other) for other in wanted - {under})}


def picture() -> str:
    """Returns the drawing, as SVG."""
    uses = arrows()
    level = floors(uses)
    top = max(level.values())
    ground = top * ROW + 16
    boxes: dict[str, Box] = {}
    for floor in range(top, 0, -1):
        rooms = _ordered([room for room in level if level[room] == floor], uses, boxes)
        for number, room in enumerate(rooms):
            width = 7.6 * len(_title(room)) + 22
            middle = WIDTH * (number + 0.5) / len(rooms)
            boxes[room] = Box(middle - width / 2, (top - floor) * ROW + 16.0, width)
    kinds = [*KINDS, "words and settings"]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {ground + 82}" font-family="sans-serif">',
            "<title>The rooms of cib_jax, each above all that it uses</title>",
            f'<rect width="{WIDTH}" height="{ground + 82}" rx="8" fill="#fff"/>',
            *(_line(boxes[room], boxes[under]) for room in sorted(boxes) for under in sorted(direct(uses, room))),
            *(_shape(box, _title(room), _color(room)) for room, box in boxes.items()),
            _shape(Box(20, ground, WIDTH - 40), " · ".join(map(_title, GROUND)) + ": for all", COLORS[-1]),
            *(_legend(number, len(kinds), kind, ground + 56) for number, kind in enumerate(kinds)),
            "</svg>\n",
        ]
    )


def _ordered(rooms: list[str], uses: dict[str, set[str]], placed: dict[str, Box]) -> list[str]:
    """Returns a floor's rooms so that they stand near those above that use them."""

    def middle(room: str) -> float:
        over = [box.left + box.width / 2 for user, box in placed.items() if room in direct(uses, user)]
        return sum(over) / len(over) if over else WIDTH / 2

    return sorted(rooms, key=lambda room: (middle(room), room))


def _color(room: str) -> str:
    return COLORS[next((number for number, rooms in enumerate(KINDS.values()) if room in rooms), len(KINDS))]


def _title(room: str) -> str:
    return f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py"


def _shape(box: Box, words: str, color: str) -> str:
    rect = f'<rect x="{box.left:.0f}" y="{box.top:.0f}" width="{box.width:.0f}" height="{BOX}" rx="5"'
    return f'{rect} fill="{color}" stroke="#888"/>' + _text(box.left + box.width / 2, box.top + 22, words)


def _legend(number: int, of: int, words: str, top: float) -> str:
    left = 20 + number * (WIDTH - 40) / of
    rect = f'<rect x="{left:.0f}" y="{top:.0f}" width="12" height="12" fill="{COLORS[number]}" stroke="#888"/>'
    return rect + _text(left + 18, top + 11, words, anchor="start", size=12)


def _line(above: Box, below: Box) -> str:
    x, y = above.left + above.width / 2, above.top + BOX
    to_x, to_y = below.left + below.width / 2, below.top
    bend = (to_y - y) / 2
    path = f"M{x:.0f} {y:.0f} C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}"
    return f'<path d="{path}" fill="none" stroke="#aab" stroke-width="1.2"/>'


def _text(x: float, y: float, words: str, *, anchor: str = "middle", size: int = 14) -> str:
    place = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="#222">{html.escape(words)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
