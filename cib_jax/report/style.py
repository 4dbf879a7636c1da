"""How all figures look: legible in print, in grey and to colour-blind readers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib
import matplotlib.figure
from matplotlib.axes import Axes

# Okabe and Ito's colours, which most colour-blind readers can tell apart. Never alone: lines differ in their dashes
# and marks too, bars in their hatching.
BLUE, ORANGE, GREEN, PURPLE, SKY, RUST, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#6E6E6E",
)
COLOURS = (BLUE, RUST, GREEN, PURPLE, ORANGE, SKY, "#332288", "#882255", "#999933", "#44AA99")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
SEQUENTIAL, DIVERGING = "cividis", "PuOr"

_RULES: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


def words(text: object) -> str:
    """Returns text of a user's as Matplotlib shows it letter by letter: no formula, no hidden label, valid Unicode."""
    shown = str(text).encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Returns a function that draws under the rules of this file, and leaves Matplotlib's own as they were."""

    @functools.wraps(draw)
    def inside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with matplotlib.rc_context(_RULES):
            return draw(*args, **kwargs)

    return inside


def figure(
    title: str, *, width: float = 6.4, height: float = 3.8, columns: int = 1
) -> tuple[matplotlib.figure.Figure, Sequence[Axes]]:
    """Returns a figure, in inches, with a title that says what to see, and its axes side by side."""
    # No pyplot: no figure stays behind, and no display is wanted.
    made = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    made.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold", wrap=True)
    return made, list(made.subplots(1, columns, squeeze=False)[0])
