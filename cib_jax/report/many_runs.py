"""The figures of a comparison or a search: many runs, each a number or a few."""

from collections.abc import Mapping, Sequence

import matplotlib.ticker
import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.figure import Figure

from cib_jax.report import style


@style.styled
def heat_map(
    columns: Sequence[float],
    rows: Sequence[float],
    values: Shaped[np.ndarray, "rows columns"],
    *,
    names: tuple[str, str],
    score: str,
) -> Figure:
    """Returns a score over two hyper-parameters, blank where it was not tried.

    Args:
      columns: values of the first one.
      rows: values of the second one.
      values: the score of each pair, NaN where there is none.
      names: of the two.
      score: its name.
    """
    row, column = (int(at) for at in np.unravel_index(np.nanargmax(values), values.shape))
    made, (axis,) = style.figure(
        f"{_capital(score)} is best, {values[row, column]:.3f}, at {names[0]} = {columns[column]:.3g} and {names[1]} = "
        f"{rows[row]:.3g}; over the sweep it varies by {np.nanmax(values) - np.nanmin(values):.3f}",
        width=1.6 + 0.75 * max(len(columns), 6),
        height=1.6 + 0.5 * max(len(rows), 4),
    )
    image = axis.imshow(values, cmap=style.SEQUENTIAL, aspect="auto", interpolation="nearest", origin="lower")
    axis.grid(False)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "black" if value > middle else "white"
            axis.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set(
        xlabel=names[0],
        ylabel=names[1],
        xticks=range(len(columns)),
        yticks=range(len(rows)),
        xticklabels=[f"{value:.3g}" for value in columns],
        yticklabels=[f"{value:.3g}" for value in rows],
    )
    made.colorbar(image, label=score)
    return made


@style.styled
def methods(
    titles: Sequence[str],
    bits: Sequence[int],
    mean: Float[np.ndarray, "methods bits"],
    deviation: Float[np.ndarray, "methods bits"],
    *,
    score: str,
) -> Figure:
    """Returns a comparison of methods, the best above; NaN where nothing was measured."""
    known = np.isfinite(mean)
    overall = np.where(known.any(axis=1), np.nansum(mean, axis=1) / np.maximum(known.sum(axis=1), 1), -1)
    order = np.argsort(overall, kind="stable")
    titles = [style.words(title) for title in titles]
    measured = [length for length, column in zip(bits, mean.T, strict=True) if np.isfinite(column).any()]
    leaders = [titles[int(np.nanargmax(column))] for column in mean.T if np.isfinite(column).any()]
    lead = f"{leaders[0]} leads" if len(set(leaders)) == 1 else " and ".join(dict.fromkeys(leaders)) + " lead"
    made, (axis,) = style.figure(
        f"{lead} in {score} at {', '.join(map(str, measured))} bits", width=7.4, height=1.4 + 0.36 * len(titles)
    )
    spread = np.linspace(-0.22, 0.22, len(bits)) if len(bits) > 1 else [0.0]
    for place, (length, shift) in enumerate(zip(bits, spread, strict=True)):
        axis.errorbar(
            mean[order, place],
            np.arange(len(titles)) - shift,
            xerr=deviation[order, place],
            fmt=style.MARKS[place % len(style.MARKS)],
            color=style.COLOURS[place % len(style.COLOURS)],
            markersize=5,
            capsize=2,
            label=f"{length} bits",
        )
    axis.set(xlabel=f"{score}, mean and deviation over seeds", yticks=range(len(titles)))
    axis.set_yticklabels([titles[number] for number in order])
    axis.legend(loc="lower right")
    return made


@style.styled
def search(numbers: Sequence[int], values: Float[np.ndarray, " trials"], *, score: str) -> Figure:
    """Returns what each trial of a search came to, and the best so far."""
    best = int(np.argmax(values))
    made, (axis,) = style.figure(
        f"Trial {numbers[best]} of {numbers[-1]} was the best by {score}, {values[best]:.3f}; the median is "
        f"{np.median(values):.3f}"
    )
    axis.plot(numbers, values, "o", color=style.BLUE, markersize=4, label="a trial")
    axis.step(numbers, np.maximum.accumulate(values), where="post", color=style.RUST, label="best so far")
    axis.set(xlabel="trial", ylabel=score)
    axis.legend(loc="lower right")
    return made


@style.styled
def parameters(
    drawn: Mapping[str, Sequence[float | str]], values: Float[np.ndarray, " trials"], *, score: str
) -> Figure:
    """Returns a score over each hyper-parameter of a search."""
    best = int(np.argmax(values))
    told = ", ".join(
        f"{name} {column[best]:.3g}" if isinstance(column[best], float) else style.words(f"{name} {column[best]}")
        for name, column in drawn.items()
    )
    made, axes = style.figure(
        f"Best at {told} (the star)", width=2.6 * max(len(drawn), 2), height=3.2, columns=len(drawn)
    )
    for axis, (name, column) in zip(axes, drawn.items(), strict=True):
        positions: Sequence[float]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
            positions = [float(value) for value in column]
            # Over more than a factor of ten, values are told apart by their logarithm.
            if min(positions) > 0 and max(positions) > 10 * min(positions):
                axis.set_xscale("log", subs=[])
                axis.xaxis.set_major_locator(
                    matplotlib.ticker.LogLocator(subs=(1,) if max(positions) > 300 * min(positions) else (1, 3))
                )
                axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        else:
            names = sorted({str(value) for value in column})
            positions = [float(names.index(str(value))) for value in column]
            axis.set_xticks(range(len(names)), [style.words(name) for name in names])
        axis.plot(positions, values, "o", color=style.BLUE, markersize=4)
        axis.plot(positions[best], values[best], "*", color=style.RUST, markersize=13)
        axis.set(xlabel=name, ylabel=score if axis is axes[0] else "")
    return made


@style.styled
def rank_correlations(ranked: Mapping[str, float], *, of: str, trials: int) -> Figure:
    """Returns how far scores without labels order the trials as a MAP does."""
    names = list(ranked)[::-1]
    made, (axis,) = style.figure(
        f"Of scores without labels, {names[-1].replace('_', ' ')} orders {trials} trials most like {of}: "
        f"rank correlation {ranked[names[-1]]:+.2f}",
        height=1.6 + 0.35 * len(names),
    )
    bars = axis.barh([name.replace("_", " ") for name in names], [ranked[name] for name in names], color=style.BLUE)
    axis.bar_label(bars, fmt="%+.2f", padding=3)
    axis.axvline(0, color=style.GREY, linewidth=1)
    axis.set(xlabel=f"Spearman's rank correlation with {of}", xlim=(-1.3, 1.3))
    return made


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
