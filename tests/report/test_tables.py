"""Tables against numbers worked out by hand; formats read back by other readers."""

import csv
import io
import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cib_jax.report import tables
from cib_jax.report.tables import Cell, Row, Table
from tests.docs import pages

TABLE = Table(
    "MAP@1000 on a_b",
    [16, 32],
    [
        Row("LSH", [Cell([0.1, 0.3]), Cell([0.25])]),
        Row("CIBHash beta=0.1", [Cell([0.5, 0.6]), Cell([])]),
        Row("TBH", [Cell([0.9]), Cell([0.9])], published=True),
    ],
)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_cells_are_pythons_statistics(values):
    cell = Cell(values)
    assert cell.mean == statistics.fmean(values)
    assert cell.deviation == statistics.stdev(values)


def test_markdown_by_hand():
    assert tables.markdown(TABLE) == (
        "**MAP@1000 on a\\_b**\n"
        "\n"
        "| method | 16 bits | 32 bits |\n"
        "| --- | ---: | ---: |\n"
        "| LSH | 0.200 ± 0.141 | **0.250** |\n"
        "| CIBHash beta=0.1 | **0.550 ± 0.071** | – |\n"
        "| TBH | 0.900 | 0.900 |\n"
    )


def test_latex_by_hand():
    made = tables.latex(TABLE)
    assert r"\caption{MAP@1000 on a\_b}" in made
    assert r"LSH & 0.200 $\pm$ 0.141 & \textbf{0.250} \\" in made
    assert r"CIBHash beta=0.1 & \textbf{0.550 $\pm$ 0.071} & -- \\" in made
    assert made.count("{") == made.count("}")


def test_cells_of_fewer_seeds_say_so():
    table = Table("t", [8], [Row("a", [Cell([0.1, 0.3])]), Row("b", [Cell([0.2, 0.2, 0.2])])], seeds=3)
    assert "| a | **0.200 ± 0.141 (2 of 3)** |" in tables.markdown(table)
    assert "| b | **0.200 ± 0.000** |" in tables.markdown(table)


def test_equal_as_printed_are_both_the_best():
    table = Table("t", [8], [Row("a", [Cell([0.50001])]), Row("b", [Cell([0.50002])])])
    assert tables.markdown(table).count("**0.500**") == 2


def test_nothing_measured_is_a_dash_and_never_the_best():
    assert "**–" not in tables.markdown(Table("t", [8], [Row("a", [Cell([])])]))
    assert tables.comma_separated([]) == ""


def test_csv_is_read_back_by_pythons_reader():
    records = [{"method": 'a, "b"', "map": 0.5}, {"method": "c", "map": None}]
    read = list(csv.DictReader(io.StringIO(tables.comma_separated(records))))
    assert read == [{"method": 'a, "b"', "map": "0.5"}, {"method": "c", "map": ""}]


@pytest.mark.parametrize(
    ("protocol", "k", "rows"),
    [("cifar10-10k-50k", 1000, 3), ("cifar10-10k-50k", 100, 0), ("own", 1000, 0), ("coco-5000", 5000, 3)],
)
def test_published_rows_stand_only_beside_figures_of_their_protocol(protocol, k, rows):
    assert len(tables.published_rows(protocol, k)) == rows


PUBLISHED = {
    "cifar10-10k-50k": ("CIBHash 0.590 0.622 0.641", "TBH 0.532 0.573 0.578", "ITQ 0.305 0.325 0.349"),
    "nuswide-2100": ("CIBHash 0.790 0.807 0.815", "TBH 0.717 0.725 0.735", "ITQ 0.627 0.645 0.664"),
    "coco-5000": ("CIBHash 0.737 0.760 0.775", "TBH 0.706 0.735 0.722", "ITQ 0.598 0.624 0.648"),
}
"""Table 1 of CIBHash (arXiv 2105.06138): MAP at 16, 32 and 64 bits by protocol."""


@pytest.mark.parametrize(("protocol", "k"), [("cifar10-10k-50k", 1000), ("nuswide-2100", 5000), ("coco-5000", 5000)])
def test_published_numbers_are_those_of_the_paper(protocol, k):
    rows = tables.published_rows(protocol, k)
    written = [f"{row.title} " + " ".join(f"{row.values[bits][0]:.3f}" for bits in (16, 32, 64)) for row in rows]
    assert written == [row.replace(" ", " (VGG-16) ", 1) for row in PUBLISHED[protocol]]


@pytest.mark.parametrize(("page", "count"), [("docs/results.md", 3), ("README.md", 1)])
def test_pages_quote_the_published_numbers(page, count):
    """Every row of a table that is marked as published, with a name and three numbers."""
    lines = (pages.DOCS.parent / page).read_text(encoding="utf-8").splitlines()
    marked = [line for line in lines if re.match(r"\| .*VGG-16.*published", line)]
    quoted = [" ".join([re.findall(r"\w+", line)[0], *re.findall(r"\| (0\.\d{3})\b", line)]) for line in marked]
    assert quoted == list(PUBLISHED["cifar10-10k-50k"][:count])
