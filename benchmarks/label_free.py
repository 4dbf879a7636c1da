"""How far scores without labels order runs as MAP does, from what comparisons and searches left behind.

`python -m benchmarks.label_free --search runs/sweep --table runs/table`: of each search, with and without the trials
whose codes collapsed; of each comparison, `separation` across its methods.
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
"""Of the highest entropy among a search's trials: below it, codes count as collapsed."""


def correlation(one: Sequence[float], other: Sequence[float]) -> str:
    """Returns Spearman's rank correlation, a dash where one of both never changes."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return "–"
    return f"{scipy.stats.spearmanr(one, other).statistic:+.2f}"


def print_search(folder: pathlib.Path) -> None:
    """Prints the rank correlations with test MAP of a search's scores and of the numbers that it drew."""
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
        rows.append((f"drawn: {name}", *cells, ""))
    header = ("score", f"all {len(trials)}", f"{len(kept)} not collapsed", "test MAP of the run it picks")
    measuring.print_table(header, rows)
    print(f"best test MAP {max(trial['scores']['map'] for trial in trials):.3f}")


def print_comparison(folder: pathlib.Path) -> None:
    """Prints how `separation` orders the cells of a comparison, length by length, and its mean for each method."""
    cells = json.loads((folder / "comparison.json").read_text())["cells"]
    for cell in cells:
        codes = np.load(pathlib.Path(cell["workdir"]) / "codes" / "database_codes.npy")
        some = np.sort(np.random.default_rng(0).permutation(len(codes))[:IMAGES])
        cell["separation"] = code_quality.separation(codes[some])
    lengths = sorted({cell["bits"] for cell in cells})
    print(f"\n{folder}: separation, mean over seeds, and its rank correlation with MAP across methods\n")
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        of = [[c["separation"] for c in cells if (c["method"], c["bits"]) == (method, bits)] for bits in lengths]
        rows.append((method, *(f"{np.mean(values):.2f}" for values in of)))
    told = [
        correlation(*([c[key] for c in cells if c["bits"] == bits] for key in ("separation", "map")))
        for bits in lengths
    ]
    rows.append(("rank correlation with MAP", *told))
    measuring.print_table(("method", *(f"{bits} bits" for bits in lengths)), rows)


def main() -> None:
    """Reads the flags and prints."""
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
