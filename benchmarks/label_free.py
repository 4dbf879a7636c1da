"""Rank correlation of label-free scores with MAP, from the results of hyperparameter searches and comparisons.

`python -m benchmarks.label_free --search runs/sweep --table runs/table` prints the correlations for each search, with
and without the trials with collapsed codes, and those of `separation` across methods for each comparison.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np
import scipy.stats

from benchmarks import measuring
from cib_jax.retrieval import code_quality

IMAGES = 2000
COLLAPSED = 0.5
"""Codes count as collapsed if their entropy is below this share of the highest in the search."""


def correlation(one: Sequence[float], other: Sequence[float]) -> str:
    """Returns Spearman's rank correlation, or a dash if one of the two is constant."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return "–"
    return f"{scipy.stats.spearmanr(one, other).statistic:+.2f}"


def print_search(folder: pathlib.Path) -> None:
    """Prints the rank correlations of a search's scores and sampled hyperparameters with test MAP."""
    trials = [t for t in json.loads((folder / "search.json").read_text())["trials"] if t["value"] is not None]
    most = max(trial["scores"]["entropy"] for trial in trials)
    kept = [trial for trial in trials if trial["scores"]["entropy"] >= COLLAPSED * most]
    print(f"\n{folder}: rank correlation with test MAP\n")
    rows = []
    for name in code_quality.SCORES:
        cells = [correlation(*([t["scores"][key] for t in some] for key in (name, "map"))) for some in (trials, kept)]
        best = max(trials, key=lambda trial: trial["scores"][name])
        rows.append((name, *cells, f"{best['scores']['map']:.3f}"))
    for name in trials[0]["params"]:
        cells = [
            correlation([t["params"][name] for t in some], [t["scores"]["map"] for t in some])
            for some in (trials, kept)
        ]
        rows.append((f"sampled: {name}", *cells, ""))
    header = ("score", f"all {len(trials)}", f"{len(kept)} not collapsed", "test MAP of the selected run")
    measuring.print_table(header, rows)
    print(f"best test MAP {max(trial['scores']['map'] for trial in trials):.3f}")


def print_comparison(folder: pathlib.Path) -> None:
    """Prints the mean `separation` of each method in a comparison, and its rank correlation with MAP."""
    cells = json.loads((folder / "comparison.json").read_text())["cells"]
    for cell in cells:
        codes = np.load(pathlib.Path(cell["workdir"]) / "codes" / "database_codes.npy")
        some = np.sort(np.random.default_rng(0).permutation(len(codes))[:IMAGES])
        cell["separation"] = code_quality.separation(codes[some])
    lengths = sorted({cell["bits"] for cell in cells})
    print(f"\n{folder}: separation, mean over seeds, and its rank correlation with MAP across methods\n")
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        scores = [[c["separation"] for c in cells if (c["method"], c["bits"]) == (method, bits)] for bits in lengths]
        rows.append((method, *(f"{np.mean(values):.2f}" for values in scores)))
    correlations = [
        correlation(*([c[key] for c in cells if c["bits"] == bits] for key in ("separation", "map")))
        for bits in lengths
    ]
    rows.append(("rank correlation with MAP", *correlations))
    measuring.print_table(("method", *(f"{bits} bits" for bits in lengths)), rows)


def main() -> None:
    """Reads the flags and prints the tables."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--search", type=pathlib.Path, nargs="*", default=[], help="workdirs of --mode=tune")
    parser.add_argument("--table", type=pathlib.Path, nargs="*", default=[], help="workdirs of --mode=compare")
    flags = parser.parse_args()
    for folder in flags.search:
        print_search(folder)
    for folder in flags.table:
        print_comparison(folder)


if __name__ == "__main__":
    main()
