"""Tables of results: methods by code lengths, mean ± standard deviation over seeds, beside published results."""

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Published(NamedTuple):
    """A row of a published table: MAP by code length."""

    title: str
    values: Mapping[int, Sequence[float]]


_CIBHASH = {
    ("cifar10-10k-50k", 1000): ((0.590, 0.622, 0.641), (0.532, 0.573, 0.578), (0.305, 0.325, 0.349)),
    ("nuswide-2100", 5000): ((0.790, 0.807, 0.815), (0.717, 0.725, 0.735), (0.627, 0.645, 0.664)),
    ("coco-5000", 5000): ((0.737, 0.760, 0.775), (0.706, 0.735, 0.722), (0.598, 0.624, 0.648)),
}
"""Table 1 of CIBHash (IJCAI 2021) by protocol and k: MAP of CIBHash, TBH and ITQ at 16, 32 and 64 bits."""


def published_rows(protocol: str, k: int) -> list[Published]:
    """Returns published results for a protocol, by its name, and a k; empty if no table is known."""
    lines = zip(("CIBHash", "TBH", "ITQ"), _CIBHASH.get((protocol, k), ()), strict=False)
    return [
        Published(f"{name} (VGG-16)", {16 << place: (value,) for place, value in enumerate(line)})
        for name, line in lines
    ]


class Cell(NamedTuple):
    """MAP of one method at one code length, by seed; empty if not measured."""

    values: Sequence[float]

    @property
    def mean(self) -> float | None:
        """The mean over seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over seeds; None with fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


class Row(NamedTuple):
    """One method of a table."""

    title: str
    cells: Sequence[Cell]
    published: bool = False
    """Whether the values are quoted from a paper; such a row is never marked as the best."""


class Table(NamedTuple):
    """A table with a row for each method and a column for each code length."""

    title: str
    bits: Sequence[int]
    rows: Sequence[Row]
    seeds: int = 0
    """Number of seeds per cell; a cell with fewer shows its number. 0 shows none."""


def markdown(table: Table) -> str:
    """Returns the table in GitHub's Markdown, the best mean of each column in bold."""
    lines = [
        f"**{_in_markdown(table.title)}**",
        "",
        f"| method | {' | '.join(f'{bits} bits' for bits in table.bits)} |",
        f"| --- |{' ---: |' * len(table.bits)}",
    ]
    lines += [f"| {_in_markdown(title)} | {' | '.join(cells)} |" for title, cells in _with_best(table, "**{}**", " ± ")]
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """Returns the table in LaTeX with the package booktabs, the best mean of each column in bold."""
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_in_latex(table.title)}}}",
        rf"  \begin{{tabular}}{{l{'c' * len(table.bits)}}}",
        r"    \toprule",
        rf"    Method & {' & '.join(f'{bits} bits' for bits in table.bits)} \\",
        r"    \midrule",
    ]
    for title, cells in _with_best(table, r"\textbf{{{}}}", r" $\pm$ "):
        lines.append(rf"    {_in_latex(title)} & {' & '.join(cells).replace('–', '--')} \\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]) + "\n"


def comma_separated(records: Sequence[dict[str, object]]) -> str:
    """Returns records, all with the same fields, as CSV with a header."""
    if not records:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def cell_texts(table: Table, row: Row, separator: str = " ± ") -> list[str]:
    """Returns mean and deviation of each cell of a row with three decimals; a dash if not measured."""
    seeds = 0 if row.published else table.seeds

    def text(cell: Cell) -> str:
        if cell.mean is None:
            return "–"
        deviation = f"{separator}{cell.deviation:.3f}" if cell.deviation is not None else ""
        return f"{cell.mean:.3f}{deviation}" + (f" ({len(cell.values)} of {seeds})" if len(cell.values) < seeds else "")

    return [text(cell) for cell in row.cells]


def _with_best(table: Table, bold: str, separator: str) -> Iterator[tuple[str, list[str]]]:
    """Yields title and texts of each row, the best of each column, as printed, in the format `bold`."""
    means = [
        [-1.0 if row.published or cell.mean is None else round(cell.mean, 3) for cell in row.cells]
        for row in table.rows
    ]
    best = [max(column) for column in zip(*means, strict=True)]
    for row, printed in zip(table.rows, means, strict=True):
        cells = zip(cell_texts(table, row, separator), printed, best, strict=True)
        yield row.title, [bold.format(text) if mean == most >= 0 else text for text, mean, most in cells]


def _in_markdown(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*").replace("_", r"\_")


def _in_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "β": r"$\beta$", "τ": r"$\tau$", "·": r"$\cdot$", "±": r"$\pm$", "–": "--"}
    special |= {letter: "\\" + letter for letter in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, letter) for letter in text)


def metric_rows(results: dict[str, Any], k: object = None) -> list[tuple[str, str]]:
    """Returns name and value of a run's metrics from the content of results.json; `k` labels the depth of ranking."""
    figures, code_health = results["metrics"], results["metrics"]["code_health"]
    k, rows = results["k"] if k is None else k, []
    if results["map"] is not None:
        at = figures["precision_at_k"]
        rows = [
            (f"MAP@{k}", f"{results['map']:.4f}"),
            (f"MAP@{k}, ties in random order", f"{results['map_tie_aware']:.4f}"),
            *((f"precision@{k}", f"{value:.4f}") for k, value in zip(at["k"], at["precision"], strict=True)),
            ("precision within Hamming radius 2", f"{figures['precision_radius_2']:.4f}"),
            ("queries with nothing within radius 2", f"{figures['empty_radius_2']:.1%}"),
        ]
    for bits, value in figures.get("map_of_first_bits", {}).items():
        rows.append((f"MAP@{k} of the first {bits} bits", f"{value:.4f}"))
    for at, value in figures.get("neighbor_recall", {}).items():
        rows.append((f"recall of the {at} nearest by cosine", f"{value:.4f}"))
    return [
        *rows,
        ("distinct codes in the database", f"{code_health['distinct_codes']:,} of {results['counts']['database']:,}"),
        ("mean |correlation| of two bits", f"{code_health['mean_abs_correlation']:.3f}"),
        ("entropy of the codes", f"{code_health['entropy']:.2f} bits"),
    ]
