"""Codes of several runs by t-SNE, side by side: a row for each data set, a column for each method.

`python -m benchmarks.embeddings --out=codes.png --columns=2 "CIBHash=RUN" "diffusion=RUN" …` draws the codes that each
evaluated run has left in `codes/` of its workdir, the first `--bits` of each, in the colors of the ten most frequent
classes. The share in a title is that of items whose nearest code is of the same class. t-SNE keeps what is near, no
more: how large a group is drawn, or how far from another one, has no meaning.
"""

import pathlib

import numpy as np

from benchmarks import measuring
from cib_jax.codes import first_bits
from cib_jax.report import figures

ITEMS = 2000
INCHES = 4.0  # side of a panel


def main() -> None:
    """Reads the flags and writes the figure."""
    parser = measuring.parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="TITLE=RUN", help="a title and an evaluated run's workdir")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="PNG to write")
    parser.add_argument("--columns", type=int, default=2, help="panels side by side")
    parser.add_argument("--bits", type=int, default=64, help="bits of a code that are drawn, the first ones")
    flags = parser.parse_args()
    for folder in (run.partition("=")[2] for run in flags.runs):
        if not (pathlib.Path(folder) / "codes" / "database_labels.npy").exists():
            parser.error(f"{folder} has no codes with labels; give the workdir of an evaluated run")
    import matplotlib.figure  # after the flags, since it takes a second

    rows = -(-len(flags.runs) // flags.columns)
    made = matplotlib.figure.Figure(figsize=(INCHES * flags.columns, INCHES * rows), layout="constrained", dpi=110)
    panels = made.subplots(rows, flags.columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, run in zip(panels, flags.runs, strict=False):
        title, _, folder = run.partition("=")
        codes, labels = (
            np.load(pathlib.Path(folder) / "codes" / f"database_{kind}.npy") for kind in ("codes", "labels")
        )
        some = np.sort(np.random.default_rng(0).permutation(len(codes))[:ITEMS])
        codes, labels = first_bits(codes[some], flags.bits), labels[some]
        points = figures.points(codes, seed=0)
        if points is None:
            parser.error(f"{folder} has fewer than five distinct codes")
        shown = figures.classes(labels, [])
        colors = np.array(["#CCCCCC", *figures.COLORS])[shown.labels + 1]  # gray for other classes
        panel.scatter(*points.T, c=colors, s=5, linewidths=0)
        panel.set_title(f"{title}: {figures.agreement(codes, labels):.0%}", fontsize=11)
    made.savefig(flags.out)


if __name__ == "__main__":
    main()
