"""Figures of runs and comparisons, drawn from numbers alone; each title states what the numbers show.

All are legible in print, in gray and for color-blind readers: lines differ in dashes and markers too, bars in hatching.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.ticker
import numpy as np
import sklearn.manifold
import threadpoolctl
from jaxtyping import Float, Float64, Int, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from cib_jax import codes
from cib_jax.files import printable
from cib_jax.retrieval import hamming
from cib_jax.retrieval.metrics import Curves

# Style.

# Okabe and Ito's colors, which most color-blind readers can distinguish.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RUST, GREY = "#56B4E9", "#D55E00", "#6E6E6E"
COLORS = (BLUE, RUST, GREEN, PURPLE, ORANGE, SKY, "#332288", "#882255", "#999933", "#44AA99")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
CLASSES = 10
"""Largest number of classes in an embedding: more colors and markers cannot be distinguished."""

_RULES: Any = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}

# In inches: half of a report's page and all of it, so that 12 points are the 16 pixels of its text.
HALF, WHOLE = 5.4, 11.0

# Decorates a function that draws: in this file's style, and leaving Matplotlib's settings as they were.
styled = matplotlib.rc_context(_RULES)


def figure(
    title: str, *, width: float = HALF, height: float = 3.8, columns: int = 1, **settings: Any
) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure with a title and its axes side by side, each with `settings`; width and height are in inches."""
    # Without pyplot, which keeps every figure in memory and looks for a display.
    made = Figure(figsize=(width, height), layout="constrained")
    made.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", wrap=True)
    return made, list(made.subplots(1, columns, squeeze=False, subplot_kw=settings)[0])


def legend_below(made: Figure, columns: int = 1) -> None:
    """Explains what is drawn below the axes, where nothing is covered."""
    made.legend(loc="outside lower left", ncols=columns)


def whole_ticks(axis: Axis) -> None:
    """Marks whole numbers only, such as epochs."""
    axis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))


def log_ticks(axis: Axis, values: Sequence[float] | Float[np.ndarray, " n"]) -> None:
    """Marks plain numbers on a log scale, a few even if `values` span less than a factor of ten."""
    span = max(values) / min(values)
    digits = (1,) if span > 300 else (1, 3) if span > 10 else (1, 2, 5) if span > 4 else range(1, 10)
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=digits))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def escape(text: object) -> str:
    """Returns any text in a form that Matplotlib draws literally: no formula, no hidden label, valid Unicode."""
    escaped = printable(str(text)).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def fold(text: object, width: int = 32, most: int = 4) -> str:
    """Returns any text as `escape` does, cut to lines that leave room for the axes beside them; width in characters."""
    lines = textwrap.wrap(str(text), width)
    return escape("\n".join(lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][: width - 1] + "…"]))


# Training.

_VALIDATIONS = {"validation_map": "validation MAP", "separation": "separation"}
"""Labels of the scores of validations, by their names in metrics.jsonl."""

_NOT_DRAWN = ("step", "epoch", "images_per_second", "gradient_norm", "parameter_norm", *_VALIDATIONS)
"""Entries of metrics.jsonl that are no loss terms."""


@styled
def training(records: Sequence[Mapping[str, float]]) -> Figure:
    """Returns the loss terms over epochs, and the score of validations if any, from the lines of metrics.jsonl.

    Terms of a user's own objective come after those of the package, under their names.
    """
    first, last = records[0], records[-1]
    panels = [("contrast", "contrast (nats)"), ("kl", "KL bottleneck (nats)"), ("loss", "loss (nats)")]
    panels = [(name, label) for name, label in panels if name in last]
    panels += [(name, escape(name)) for name in last if name not in {*_NOT_DRAWN, *dict(panels)}]
    name, label = panels[0]
    title = f"{name.capitalize()} went from {first[name]:.2f} to {last[name]:.2f} nats in {last['epoch']:g} epochs"
    panels += [(name, label) for name, label in _VALIDATIONS.items() if any(name in record for record in records)]
    made, axes = figure(
        title + (f"; KL ended at {last['kl']:.2f} nats" if "kl" in last else ""),
        width=WHOLE,
        height=3.4,
        columns=len(panels),
        xlabel="epoch",
        xlim=(0, 1.05 * last["epoch"]),
    )
    for axis, (name, label), color in zip(axes, panels, COLORS, strict=False):
        values = [(record["epoch"], record[name]) for record in records if name in record]
        axis.plot(*zip(*values, strict=True), color=color, marker="." if len(values) < 20 else "")
        axis.set_ylabel(label)
        whole_ticks(axis.xaxis)
    return made


# Retrieval.


@styled
def map_against_k(curves: Curves) -> Figure:
    """Returns MAP@k over k."""
    most = int(np.argmax(curves.map))
    made, (axis,) = figure(
        f"MAP@k is highest, {curves.map[most]:.3f}, at k = {curves.k[most]:,}, and {curves.map[-1]:.3f} at "
        f"k = {curves.k[-1]:,}"
    )
    axis.plot(curves.k, curves.map, color=BLUE, marker="o")
    axis.set(xlabel="k (log scale)", ylabel="MAP@k", xscale="log", ylim=(0, 1))
    log_ticks(axis.xaxis, curves.k)
    return made


@styled
def precision_recall(
    precision: Float[np.ndarray, " radii"], recall: Float[np.ndarray, " radii"], chance: float
) -> Figure:
    """Returns the precision–recall curve over Hamming radii from 0 on; `chance` is the share of relevant pairs."""
    title = f"Precision is {precision[-1]:.2f} at the highest recall, {recall[-1]:.2f}; chance gives {chance:.2f}"
    if recall[0] <= 0.5 <= recall[-1]:
        half = float(np.interp(0.5, recall, precision))
        title = f"At recall 0.5, precision is {half:.2f}; chance gives {chance:.2f}"
    made, (axis,) = figure(title, xlabel="recall", ylabel="precision", xlim=(-0.02, 1.02), ylim=(0, 1.02))
    axis.plot(recall, precision, color=BLUE, marker="o", markersize=3, label="within Hamming radius 0, 1, 2, …")
    axis.axhline(chance, color=GREY, linestyle="--", label="chance")
    # Labels only where two do not overlap.
    last = -1.0
    for radius, (x, y) in enumerate(zip(recall, precision, strict=True)):
        if x - last > 0.08:
            axis.annotate(f"{radius}", (x, y), (0, 6), textcoords="offset points", ha="center")
            last = x
    legend_below(made)
    return made


@styled
def precision_against_returned(curves: Curves, chance: float, noun: str = "images") -> Figure:
    """Returns precision and recall over the number of images, or of what `noun` names, that are returned."""
    at = min(range(len(curves.k)), key=lambda place: abs(curves.k[place] - 100))
    made, (axis,) = figure(f"Of the first {curves.k[at]:,} {noun}, {curves.precision[at]:.0%} are relevant")
    axis.plot(curves.k, curves.precision, color=BLUE, marker="o", label="precision")
    axis.plot(curves.k, curves.recall, color=RUST, marker="s", linestyle="--", label="recall")
    axis.axhline(chance, color=GREY, linestyle=":", label="precision by chance")
    axis.set(xlabel=f"{noun} returned (log scale)", ylabel="mean over queries", xscale="log", ylim=(0, 1))
    log_ticks(axis.xaxis, curves.k)
    legend_below(made, 3)
    return made


@styled
def precision_within_radius(curves: Curves) -> Figure:
    """Returns precision and the share of empty lookups within each Hamming radius from 0 to 4."""
    made, (axis,) = figure(
        f"Within Hamming radius 2, precision is {curves.radius_precision[2]:.2f} and "
        f"{curves.radius_empty[2]:.0%} of the queries find nothing"
    )
    radii = np.arange(len(curves.radius_precision))
    for bars, hatch, color, label, shift in (
        (curves.radius_precision, "", BLUE, "precision (0 where nothing is found)", -0.2),
        (curves.radius_empty, "///", ORANGE, "share of queries that find nothing", 0.2),
    ):
        drawn = axis.bar(radii + shift, bars, 0.38, color=color, hatch=hatch, edgecolor="white", label=label)
        axis.bar_label(drawn, fmt="%.2f", fontsize=9)
    axis.set(xlabel="Hamming radius (bits)", ylabel="mean over queries", xticks=radii, ylim=(0, 1.12))
    legend_below(made)
    return made


@styled
def distances(relevant: Float[np.ndarray, " distances"], irrelevant: Float[np.ndarray, " distances"]) -> Figure:
    """Returns the distributions of the distances of relevant and of irrelevant pairs, from shares at each distance."""
    bits = np.arange(len(relevant))
    means = [float(bits @ share) for share in (relevant, irrelevant)]
    title = (
        f"Relevant pairs are {means[0]:.1f} bits apart on average, irrelevant ones {means[1]:.1f}; "
        f"the two overlap by {np.minimum(relevant, irrelevant).sum():.0%}"
    )
    if not relevant.any() or not irrelevant.any():
        kind = "relevant" if relevant.any() else "irrelevant"
        title = f"All pairs are {kind}, {max(means):.1f} bits apart on average"
    xlabel = "Hamming distance (bits); dashed: the mean"
    made, (axis,) = figure(title, xlabel=xlabel, ylabel="share of the pairs", xlim=(-0.5, len(bits) - 0.5))
    for share, color, hatch, label, mean in (
        (relevant, BLUE, "", "pairs that share a label", means[0]),
        (irrelevant, RUST, "///", "pairs that share none", means[1]),
    ):
        axis.bar(bits, share, 1.0, facecolor=color, alpha=0.45, hatch=hatch, edgecolor="white", label=label)
        axis.step(bits, share, where="mid", color=color)
        axis.axvline(mean, color=color, linestyle="--", linewidth=1)
    legend_below(made, 2)
    return made


# Codes.


@styled
def bit_balance(balance: Sequence[float], noun: str = "images") -> Figure:
    """Returns the share of ones at each bit of the codes of images, or of what `noun` names."""
    shares = np.asarray(balance)
    dead = int(np.sum((shares == 0) | (shares == 1)))
    use = f"{dead} never change" if dead else "every bit is in use"
    made, (axis,) = figure(f"Bits are one in {shares.min():.0%} to {shares.max():.0%} of the {noun}; {use}")
    axis.bar(np.arange(len(shares)), shares - 0.5, 0.85, bottom=0.5, color=BLUE)
    axis.axhline(0.5, color=GREY, linewidth=1)
    axis.set(xlabel="bit", ylabel=f"share of {noun} with a one", ylim=(0, 1), xlim=(-0.7, len(shares) - 0.3))
    return made


@styled
def bit_correlation(correlation: Float64[np.ndarray, "bits bits"]) -> Figure:
    """Returns the matrix of correlations of bits; blank for a bit that never changes."""
    pairs = np.abs(correlation[np.triu_indices(len(correlation), 1)])
    pairs = pairs[np.isfinite(pairs)]
    title = "No two bits change, so none correlate"
    if len(pairs):
        title = f"Two bits correlate by {pairs.mean():.2f} on average and by {pairs.max():.2f} at most"
    made, (axis,) = figure(title, height=4.6, xlabel="bit", ylabel="bit")
    correlation = correlation.copy()
    np.fill_diagonal(correlation, np.nan)
    image = axis.imshow(correlation, cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
    axis.grid(False)
    made.colorbar(image, label="Pearson correlation")
    return made


@styled
def occupancy(counts: Int[np.ndarray, " distinct"], bits: int, noun: str = "images") -> Figure:
    """Returns the number of images, or of what `noun` names, that share each code, largest first."""
    alone, total = int((counts == 1).sum()), int(counts.sum())
    made, (axis,) = figure(
        f"{total:,} {noun} have {len(counts):,} different codes; {alone / total:.0%} of the {noun} share theirs "
        f"with no other, {counts[0]:,} share the most frequent one"
    )
    axis.plot(np.arange(1, len(counts) + 1), counts, color=BLUE, linewidth=2, label="measured")
    even = math.ldexp(total, -bits)
    if even >= 1:
        axis.axhline(even, color=GREY, linestyle="--", label=f"uniform over 2^{bits} codes")
        legend_below(made, 2)
    axis.set(xlabel="code, by rank (log scale)", ylabel=f"{noun} (log scale)", xscale="log", yscale="log")
    log_ticks(axis.xaxis, [1, len(counts)])
    log_ticks(axis.yaxis, counts)
    return made


# Embedding by t-SNE.


class ClassLegend(NamedTuple):
    """Classes of an embedding: for each image, the index into `names`, −1 for other classes."""

    labels: Int[np.ndarray, " n"]
    names: list[str]


def points(packed: UInt8[np.ndarray, "n bytes"], seed: int) -> Float[np.ndarray, "n 2"] | None:
    """Returns t-SNE's points for codes, from their Hamming distances; None for fewer than 5 distinct codes.

    Each distinct code is embedded once, with perplexity 30, or a third of their number; the points of equal codes are
    scattered a little, so that all are seen.

    References:
      van der Maaten & Hinton, Visualizing data using t-SNE, JMLR 2008.
    """
    distinct, places = np.unique(packed, axis=0, return_inverse=True)
    if len(distinct) < 5:
        return None
    # The squared Euclidean distance of bits is their Hamming distance.
    bits = codes.ones(distinct).astype(np.float32)
    # Half of the usual iterations, of larger steps, end at nearly the same divergence.
    settings: Any = {"init": "pca", "random_state": seed, "max_iter": 500, "learning_rate": 200.0, "angle": 0.7}
    # OpenMP's threads wait by spinning: where other programs use the cores, two are slower than one.
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        embedding = sklearn.manifold.TSNE(2, perplexity=min(30.0, (len(distinct) - 1) / 3), **settings)
        embedded = embedding.fit_transform(bits)
    apart = np.random.default_rng(seed).normal(scale=0.005 * np.ptp(embedded), size=(len(packed), 2))
    first = np.zeros(len(packed), bool)
    first[np.unique(places, return_index=True)[1]] = True
    return embedded[places.reshape(-1)] + np.where(first[:, None], 0, apart)


def classes(labels: Shaped[np.ndarray, "n ..."], names: Sequence[str]) -> ClassLegend:
    """Returns the most frequent classes, up to ten; an image with several of them gets the rarest."""
    hot = labels.astype(bool) if labels.ndim == 2 else labels[:, None] == np.arange(int(labels.max()) + 1)
    counts = hot.sum(axis=0)
    most = np.argsort(-counts, kind="stable")[:CLASSES]
    most = most[counts[most] > 0]
    legend = np.sort(most)  # by class, which is easier to look up than by frequency
    indices = np.full(len(labels), -1)
    for number in most:  # the most frequent first, so that a rarer one replaces it
        indices[hot[:, number]] = np.searchsorted(legend, number)
    return ClassLegend(indices, [names[number] if number < len(names) else f"class {number}" for number in legend])


def agreement(packed: UInt8[np.ndarray, "n bytes"], labels: Shaped[np.ndarray, "n ..."]) -> float:
    """Returns the share of items that have a label in common with the nearest other item, ties in order."""
    first, second = hamming.rank(packed, packed, 2).T
    other = np.where(first == np.arange(len(packed)), second, first)
    if labels.ndim == 2:
        return float(np.mean((labels.astype(bool) & labels.astype(bool)[other]).any(axis=1)))
    return float(np.mean(labels == labels[other]))


@styled
def embedding(
    points: Float[np.ndarray, "n 2"],
    labels: Int[np.ndarray, " n"] | None,
    names: Sequence[str],
    agreement: float | None,
    noun: str = "images",
) -> Figure:
    """Returns a scatter plot of t-SNE's points of codes, colored and marked by class, if known.

    `labels` and `names` are those of a `ClassLegend`. `agreement` is the share that the function of this name returns.
    """
    title = f"{len(points):,} {noun} by t-SNE of their codes"
    if agreement is not None:
        title += f": for {agreement:.0%}, the nearest is of the same class"
    xlabel = "only which points are near is meaningful;\nthe axes have no unit"
    made, (axis,) = figure(title, height=4.6, xticks=[], yticks=[], xlabel=xlabel)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    if labels is None:
        axis.scatter(points[:, 0], points[:, 1], s=6, color=BLUE, linewidths=0)
        return made
    others = labels < 0
    if others.any():
        axis.scatter(points[others, 0], points[others, 1], s=6, color="#CCCCCC", linewidths=0, label="other classes")
    style: Any = {"s": 18, "linewidths": 0.3, "edgecolors": "white", "alpha": 0.85}
    for number, (name, color, mark) in enumerate(zip(names, COLORS, MARKS, strict=False)):
        axis.scatter(*points[labels == number].T, color=color, marker=mark, label=fold(name), **style)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=1.6)
    return made


# Comparisons of many runs.


@styled
def heat_map(
    columns: Sequence[float],
    rows: Sequence[float],
    values: Shaped[np.ndarray, "rows columns"],
    *,
    names: tuple[str, str],
    score: str,
) -> Figure:
    """Returns a score over two hyperparameters, `columns` and `rows` in this order of `names`; NaN is left blank."""
    row, column = (int(at) for at in np.unravel_index(np.nanargmax(values), values.shape))
    low, high = np.nanmin(values), np.nanmax(values)
    made, (axis,) = figure(
        f"{score[:1].upper()}{score[1:]} is best, {values[row, column]:.3f}, at {names[0]} = {columns[column]:.3g} and "
        f"{names[1]} = {rows[row]:.3g}; over the sweep it varies by {high - low:.3f}",
        width=1.6 + 0.75 * max(len(columns), 6),
        height=1.6 + 0.5 * max(len(rows), 4),
        xlabel=names[0],
        ylabel=names[1],
    )
    image = axis.imshow(values, cmap="cividis", aspect="auto", interpolation="nearest", origin="lower")
    axis.grid(False)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "black" if value > (low + high) / 2 else "white"
            axis.text(column, row, f"{value:.3f}", ha="center", va="center", color=color, fontsize=10)
    axis.set_xticks(range(len(columns)), [f"{value:.3g}" for value in columns])
    axis.set_yticks(range(len(rows)), [f"{value:.3g}" for value in rows])
    made.colorbar(image, label=score)
    return made


@styled
def methods(
    titles: Sequence[str],
    bits: Sequence[int],
    mean: Float[np.ndarray, "methods bits"],
    deviation: Float[np.ndarray, "methods bits"],
    *,
    score: str,
) -> Figure:
    """Returns a comparison of methods, the best at the top; NaN for what was not measured."""
    known = np.isfinite(mean)
    overall = np.where(known.any(axis=1), np.nansum(mean, axis=1) / np.maximum(known.sum(axis=1), 1), -1)
    order = np.argsort(overall, kind="stable")
    names, titles = [fold(titles[row]) for row in order], [escape(title) for title in titles]
    measured = np.flatnonzero(known.any(axis=0)).tolist()
    leaders = [titles[int(np.nanargmax(mean[:, place]))] for place in measured]
    best = " and ".join(dict.fromkeys(leaders)) + (" is best" if len(set(leaders)) == 1 else " are best")
    made, (axis,) = figure(
        f"{best} in {score} at {', '.join(str(bits[int(place)]) for place in measured)} bits",
        width=WHOLE if any("\n" in name for name in names) else HALF,
        height=2.1 + 0.25 * len(names) + 0.2 * sum(name.count("\n") + 1 for name in names),
    )
    deviation = np.where(deviation > 0, deviation, np.nan)  # of a single seed there is none to draw
    spread = np.linspace(-0.22, 0.22, len(bits)) if len(bits) > 1 else [0.0]
    for place, (length, shift) in enumerate(zip(bits, spread, strict=True)):
        style: Any = {"fmt": MARKS[place % len(MARKS)], "color": COLORS[place % len(COLORS)], "label": f"{length} bits"}
        heights, spans = np.arange(len(titles)) - shift, deviation[order, place]
        shown = spans if np.isfinite(spans).any() else None
        axis.errorbar(mean[order, place], heights, xerr=shown, markersize=5, capsize=2, **style)
    over = "\n(mean ± deviation of the seeds)" if np.isfinite(deviation).any() else ""
    axis.set_xlabel(f"{score}{over}")
    axis.set_yticks(range(len(titles)), names)
    legend_below(made, len(bits))
    return made


@styled
def search(numbers: Sequence[int], values: Float[np.ndarray, " trials"], *, score: str) -> Figure:
    """Returns the score of each trial of a search, and the best so far."""
    best = int(np.argmax(values))
    made, (axis,) = figure(
        f"Trial {numbers[best]} of {numbers[-1]} was the best by {score}, {values[best]:.3f}; the median is "
        f"{np.median(values):.3f}"
    )
    axis.plot(numbers, values, "o", color=BLUE, markersize=4, label="a trial")
    axis.step(numbers, np.maximum.accumulate(values), where="post", color=RUST, label="best so far")
    axis.set(xlabel="trial", ylabel=score)
    whole_ticks(axis.xaxis)
    legend_below(made, 2)
    return made


@styled
def parameters(
    drawn: Mapping[str, Sequence[float | str]], values: Float[np.ndarray, " trials"], *, score: str
) -> Figure:
    """Returns a score over each hyperparameter of a search."""
    best = int(np.argmax(values))
    at_best = [
        f"{name} {column[best]:.3g}" if isinstance(column[best], float) else escape(f"{name} {column[best]}")
        for name, column in drawn.items()
    ]
    made, axes = figure(f"Best at {', '.join(at_best)} (the star)", width=WHOLE, height=3.6, columns=len(drawn))
    for axis, (name, column) in zip(axes, drawn.items(), strict=True):
        positions: Sequence[float]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
            positions = [float(value) for value in column]
            # On a log scale if they span more than a factor of ten.
            if min(positions) > 0 and max(positions) > 10 * min(positions):
                ticks = [float(f"{tick:.1g}") for tick in np.geomspace(min(positions), max(positions), 3)]
                axis.set(xscale="log", xticks=ticks, xticklabels=[f"{tick:g}" for tick in ticks])
                axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            elif all(isinstance(value, int) for value in column):
                whole_ticks(axis.xaxis)
        else:
            names = sorted({str(value) for value in column})
            positions = [float(names.index(str(value))) for value in column]
            axis.set_xticks(range(len(names)), [fold(name, 20, 1) for name in names], rotation=30, ha="right")
            axis.set_xlim(-0.5, len(names) - 0.5)
        axis.plot(positions, values, "o", color=BLUE, markersize=4)
        axis.plot(positions[best], values[best], "*", color=RUST, markersize=13)
        axis.set(xlabel=name, ylabel=score if axis is axes[0] else "")
    return made


@styled
def rank_correlations(ranked: Mapping[str, float], *, of: str, trials: int) -> Figure:
    """Returns the rank correlation of each label-free score with a MAP, over trials."""
    names = list(ranked)[::-1]
    made, (axis,) = figure(
        f"Of the scores without labels, {names[-1].replace('_', ' ')} ranks {trials} trials most like {of}: "
        f"rank correlation {ranked[names[-1]]:+.2f}",
        height=1.9 + 0.45 * len(names),
    )
    bars = axis.barh([name.replace("_", " ") for name in names], [ranked[name] for name in names], color=BLUE)
    axis.bar_label(bars, fmt="%+.2f", padding=3)
    axis.axvline(0, color=GREY, linewidth=1)
    axis.set(xlabel=f"rank correlation with {of}", xlim=(-1.5, 1.5))
    return made
