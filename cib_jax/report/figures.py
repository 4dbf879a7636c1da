"""The figures of one run, each from numbers, each under a title that says what those numbers show."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Float64, Int
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
    title = f"Precision is {precision[-1]:.2f} where recall ends, at {recall[-1]:.2f}; chance gives {chance:.2f}"
    if recall[0] <= 0.5 <= recall[-1]:
        half = float(np.interp(0.5, recall, precision))
        title = f"With half of all relevant images found, precision is {half:.2f}, where chance gives {chance:.2f}"
    made, (axis,) = style.figure(title)
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
    title = (
        f"Relevant pairs are {means[0]:.1f} bits apart on average, irrelevant ones {means[1]:.1f}; "
        f"the two overlap by {np.minimum(relevant, irrelevant).sum():.0%}"
    )
    if not relevant.any() or not irrelevant.any():
        title = (
            f"All pairs are {'relevant' if relevant.any() else 'irrelevant'}, {max(means):.1f} bits apart on average"
        )
    made, (axis,) = style.figure(title)
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
    even = math.ldexp(total, -bits)
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
            label=style.words(name),
        )
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=1.6)
    return made
