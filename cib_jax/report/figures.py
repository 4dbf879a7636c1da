"""The figures of a run, each from numbers, each under a title that says what those numbers show."""

from collections.abc import Mapping, Sequence

import matplotlib.ticker
import numpy as np
from jaxtyping import Float, Float64, Int, Shaped
from matplotlib.figure import Figure

from cib_jax.report import style
from cib_jax.retrieval.curves import Curves


@style.styled
def training(records: Sequence[Mapping[str, float]]) -> Figure:
    """Returns the loss terms, and the validation MAP where there is one, over epochs, from lines of metrics.jsonl."""
    epochs = [record["epoch"] for record in records]
    first, last = records[0], records[-1]
    panels = [("contrast", "contrast (nats)"), ("kl", "KL bottleneck (nats)"), ("loss", "loss (nats)")]
    validated = [record for record in records if "validation_map" in record]
    made, axes = style.figure(
        f"Contrast went from {first['contrast']:.2f} to {last['contrast']:.2f} nats in {last['epoch']:g} epochs; "
        f"KL ended at {last['kl']:.2f} nats",
        width=8.6 if validated else 7.4,
        height=3.2,
        columns=3 + bool(validated),
    )
    for axis, (name, words), colour in zip(axes, panels, style.COLOURS, strict=False):
        axis.plot(epochs, [record[name] for record in records], color=colour, marker="." if len(epochs) < 20 else "")
        axis.set(xlabel="epoch", ylabel=words)
    if validated:
        axes[3].plot(
            [record["epoch"] for record in validated],
            [record["validation_map"] for record in validated],
            color=style.PURPLE,
            marker="o",
        )
        axes[3].set(xlabel="epoch", ylabel="validation MAP")
    return made


@style.styled
def map_against_k(curves: Curves) -> Figure:
    """Returns MAP@k over k."""
    most = int(np.argmax(curves.map))
    made, (axis,) = style.figure(
        f"MAP@k is highest, {curves.map[most]:.3f}, at k = {curves.k[most]:,}, and {curves.map[-1]:.3f} at "
        f"k = {curves.k[-1]:,}"
    )
    axis.plot(curves.k, curves.map, color=style.BLUE, marker="o")
    axis.set(xlabel="k, images looked at (log scale)", ylabel="MAP@k", xscale="log", ylim=(0, 1))
    return made


@style.styled
def precision_recall(
    precision: Float[np.ndarray, " radii"], recall: Float[np.ndarray, " radii"], chance: float
) -> Figure:
    """Returns the precision–recall curve over Hamming radii.

    Args:
      precision: within each radius, from 0 on.
      recall: the same.
      chance: the share of pairs that are relevant.
    """
    half = float(np.interp(0.5, recall, precision))
    made, (axis,) = style.figure(
        f"With half of all relevant images found, precision is {half:.2f}, where chance gives {chance:.2f}"
    )
    axis.plot(recall, precision, color=style.BLUE, marker="o", markersize=3, label="within Hamming radius 0, 1, 2, …")
    axis.axhline(chance, color=style.GREY, linestyle="--", label="chance")
    # Labelled where there is room between two.
    last = -1.0
    for radius, (x, y) in enumerate(zip(recall, precision, strict=True)):
        if x - last > 0.06:
            axis.annotate(f"{radius}", (x, y), (3, 5), textcoords="offset points", ha="left", fontsize=8)
            last = x
    axis.set(xlabel="recall", ylabel="precision", xlim=(-0.02, 1.02), ylim=(0, 1.02))
    axis.legend(loc="upper right")
    return made


@style.styled
def precision_against_returned(curves: Curves, chance: float) -> Figure:
    """Returns precision over the number of images returned."""
    at = min(range(len(curves.k)), key=lambda place: abs(curves.k[place] - 100))
    made, (axis,) = style.figure(f"Of the first {curves.k[at]:,} images, {curves.precision[at]:.0%} are relevant")
    axis.plot(curves.k, curves.precision, color=style.BLUE, marker="o", label="precision")
    axis.plot(curves.k, curves.recall, color=style.RUST, marker="s", linestyle="--", label="recall")
    axis.axhline(chance, color=style.GREY, linestyle=":", label="precision by chance")
    axis.set(xlabel="images returned (log scale)", ylabel="mean over queries", xscale="log", ylim=(0, 1))
    axis.legend()
    return made


@style.styled
def precision_within_radius(curves: Curves) -> Figure:
    """Returns precision and the share of empty lookups within Hamming radius 0 to 4."""
    made, (axis,) = style.figure(
        f"Within Hamming radius 2, precision is {curves.radius_precision[2]:.2f} and "
        f"{curves.radius_empty[2]:.0%} of the queries find nothing"
    )
    radii = np.arange(len(curves.radius_precision))
    for bars, hatch, colour, words, shift in (
        (curves.radius_precision, "", style.BLUE, "precision (0 where nothing is found)", -0.2),
        (curves.radius_empty, "///", style.ORANGE, "share of queries that find nothing", 0.2),
    ):
        drawn = axis.bar(radii + shift, bars, 0.38, color=colour, hatch=hatch, edgecolor="white", label=words)
        axis.bar_label(drawn, fmt="%.2f", fontsize=8)
    axis.set(xlabel="Hamming radius (bits)", ylabel="mean over queries", xticks=radii, ylim=(0, 1.12))
    axis.legend(loc="upper center", ncols=2)
    return made


@style.styled
def distances(relevant: Float[np.ndarray, " distances"], irrelevant: Float[np.ndarray, " distances"]) -> Figure:
    """Returns how far apart relevant and irrelevant pairs are, from their shares at each distance."""
    bits = np.arange(len(relevant))
    means = [float(bits @ share) for share in (relevant, irrelevant)]
    made, (axis,) = style.figure(
        f"Relevant pairs are {means[0]:.1f} bits apart on average, irrelevant ones {means[1]:.1f}; "
        f"the two overlap by {np.minimum(relevant, irrelevant).sum():.0%}"
    )
    for share, colour, hatch, words, mean in (
        (relevant, style.BLUE, "", "pairs that share a label", means[0]),
        (irrelevant, style.RUST, "///", "pairs that share none", means[1]),
    ):
        axis.bar(bits, share, 1.0, facecolor=colour, alpha=0.45, hatch=hatch, edgecolor="white", label=words)
        axis.step(bits, share, where="mid", color=colour)
        axis.axvline(mean, color=colour, linestyle="--", linewidth=1)
    axis.set(
        xlabel="Hamming distance (bits); dashed: the mean", ylabel="share of the pairs", xlim=(-0.5, len(bits) - 0.5)
    )
    axis.legend()
    return made


@style.styled
def bit_balance(balance: Sequence[float]) -> Figure:
    """Returns the share of ones at each bit."""
    shares = np.asarray(balance)
    dead = int(np.sum((shares == 0) | (shares == 1)))
    made, (axis,) = style.figure(
        f"Bits are one in {shares.min():.0%} to {shares.max():.0%} of the images; "
        + ("every bit is in use" if not dead else f"{dead} never change")
    )
    axis.bar(np.arange(len(shares)), shares - 0.5, 0.85, bottom=0.5, color=style.BLUE)
    axis.axhline(0.5, color=style.GREY, linewidth=1)
    axis.set(xlabel="bit", ylabel="share of images in which it is one", ylim=(0, 1), xlim=(-0.7, len(shares) - 0.3))
    return made


@style.styled
def bit_correlation(correlation: Float64[np.ndarray, "bits bits"]) -> Figure:
    """Returns the correlation of every two bits; blank with a bit that never changes."""
    pairs = np.abs(correlation[np.triu_indices(len(correlation), 1)])
    pairs = pairs[np.isfinite(pairs)]
    title = "No two bits change, so none correlate"
    if len(pairs):
        title = f"Two bits correlate by {pairs.mean():.2f} on average and by {pairs.max():.2f} at most"
    made, (axis,) = style.figure(title, width=5.2, height=4.4)
    shown = correlation.copy()
    np.fill_diagonal(shown, np.nan)
    image = axis.imshow(shown, cmap=style.DIVERGING, vmin=-1, vmax=1, interpolation="nearest")
    axis.grid(False)
    axis.set(xlabel="bit", ylabel="bit")
    made.colorbar(image, label="Pearson correlation")
    return made


@style.styled
def occupancy(counts: Int[np.ndarray, " distinct"], bits: int) -> Figure:
    """Returns how many images share a code, the fullest code first."""
    alone = int((counts == 1).sum())
    total = int(counts.sum())
    made, (axis,) = style.figure(
        f"{total:,} images have {len(counts):,} different codes; {alone / total:.0%} of the images are alone "
        f"in theirs, {counts[0]:,} share the fullest"
    )
    axis.plot(np.arange(1, len(counts) + 1), counts, color=style.BLUE, linewidth=2, label="these codes")
    even = total / 2.0**bits
    if even >= 1:
        axis.axhline(even, color=style.GREY, linestyle="--", label=f"spread evenly over 2^{bits} codes")
        axis.legend()
    axis.set(xlabel="code, by rank (log scale)", ylabel="images with it (log scale)", xscale="log", yscale="log")
    return made


@style.styled
def embedding(
    points: Float[np.ndarray, "n 2"],
    labels: Int[np.ndarray, " n"] | None,
    names: Sequence[str],
    agreement: float | None,
) -> Figure:
    """Returns a map of codes, coloured and marked by class.

    Args:
      points: where t-SNE puts each image.
      labels: an index into `names` each, −1 for classes that are not shown; None: not known.
      names: of the classes that are shown, at most ten.
      agreement: the share of images whose nearest other image is of their class.
    """
    seen = f"{len(points):,} images by t-SNE of their codes"
    title = f"{seen}: {agreement:.0%} have an image of their own class nearest" if agreement is not None else seen
    made, (axis,) = style.figure(title, width=7.4, height=5.6)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set(xticks=[], yticks=[], xlabel="nearness alone means something; the axes have no unit")
    if labels is None:
        axis.scatter(points[:, 0], points[:, 1], s=6, color=style.BLUE, linewidths=0)
        return made
    others = labels < 0
    if others.any():
        axis.scatter(points[others, 0], points[others, 1], s=6, color="#CCCCCC", linewidths=0, label="other classes")
    for number, name in enumerate(names):
        mine = points[labels == number]
        axis.scatter(
            mine[:, 0],
            mine[:, 1],
            s=18,
            color=style.COLOURS[number],
            marker=style.MARKS[number],
            linewidths=0.3,
            edgecolors="white",
            alpha=0.85,
            label=name,
        )
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=1.6)
    return made


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
    leaders = [titles[int(np.nanargmax(column))] for column in mean.T if np.isfinite(column).any()]
    lead = f"{leaders[0]} leads" if len(set(leaders)) == 1 else " and ".join(dict.fromkeys(leaders)) + " lead"
    made, (axis,) = style.figure(
        f"{lead} in {score} at {', '.join(map(str, bits))} bits", width=7.4, height=1.4 + 0.36 * len(titles)
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
        f"{name} {column[best]:.3g}" if isinstance(column[best], float) else f"{name} {column[best]}"
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
            axis.set_xticks(range(len(names)), names)
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
