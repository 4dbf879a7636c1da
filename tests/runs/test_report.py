"""Reports of runs: what is drawn of which data, and that one file holds it all."""

import base64
import html.parser
import io
import json

import numpy as np
import PIL.Image
import pytest
import rich.console

from cib_jax.commands.evaluate import evaluate
from cib_jax.commands.train import train
from cib_jax.report.html import Picture, Section
from cib_jax.runs import report
from tests import small

pytestmark = pytest.mark.usefixtures("compiled_to_run")

QUIET = rich.console.Console(quiet=True)
FIGURES = {
    "training",
    "map_against_k",
    "precision_recall",
    "precision_returned",
    "precision_radius",
    "distances",
    "bit_balance",
    "bit_correlation",
    "occupancy",
    "tsne",
    "random_queries",
    "worst_queries",
}


class Page(html.parser.HTMLParser):
    """Collects what a page shows and whatever it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.images, self.fetched = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "img":
            self.images.append(given)
        self.fetched += [
            value for name in ("src", "href") if (value := given.get(name)) and not value.startswith("data:")
        ]


FIELDS = {"report__write": True, "report__embedded": 200, "data__validation": "query_half", "train__validate_every": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("report") / "run"
    return workdir, train(small.config(**FIELDS), workdir, console=QUIET)


def test_every_figure_is_drawn_and_lies_in_the_one_page(run):
    workdir, _ = run
    files = {path.stem: path.read_bytes() for path in (workdir / "report").glob("*.png")}
    assert files.keys() == FIGURES
    papers = {path.stem: path.read_bytes() for path in (workdir / "report").glob("*.pdf")}
    assert papers.keys() == FIGURES - {"worst_queries", "random_queries"}  # sheets of photos
    assert all(content.startswith(b"%PDF-") for content in papers.values())
    page = Page((workdir / "report" / "index.html").read_text())
    assert page.fetched == []
    assert {base64.b64decode(image["src"].split(",")[1]) for image in page.images} == set(files.values())
    assert all(image["alt"] for image in page.images)
    for content in files.values():
        picture = PIL.Image.open(io.BytesIO(content)).convert("L")
        assert min(picture.size) > 300 and np.asarray(picture).std() > 5


def test_titles_say_what_the_numbers_say(run):
    workdir, results = run
    titles = " ".join(image["alt"] for image in Page((workdir / "report" / "index.html").read_text()).images)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert f"to {records[-1]['contrast']:.2f} nats in 3 epochs" in titles
    assert f"{results['map']:.3f} at k = 100" in titles
    assert (
        f"Of the first 100 images, {results['metrics']['precision_at_k']['precision'][-1]:.0%} are relevant" in titles
    )
    assert f"Within Hamming radius 2, precision is {results['metrics']['precision_radius_2']:.2f}" in titles
    correlation = results["metrics"]["code_health"]["mean_abs_correlation"]
    assert f"Two bits correlate by {correlation:.2f} on average" in titles
    assert f"{results['metrics']['code_health']['distinct_codes']:,} different codes" in titles


def test_another_k_has_a_report_of_its_own(run):
    workdir, _ = run
    before = (workdir / "report" / "index.html").read_bytes()
    evaluate(workdir, overrides={"k": 50, "report.embedded": 0}, console=QUIET)
    other = workdir / "report-epoch3-k50"
    assert "MAP@50" in (other / "index.html").read_text() and not (other / "tsne.png").exists()
    assert (workdir / "report" / "index.html").read_bytes() == before


def test_a_run_that_was_stopped_before_its_report_draws_the_same(run):
    """Also if the last line of its log is incomplete."""
    workdir, results = run
    before = {path.name: path.read_bytes() for path in (workdir / "report").glob("*.png")}
    (workdir / "report" / "index.html").unlink()
    log = workdir / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 16, "epo')
    assert train(small.config(**FIELDS), workdir, console=QUIET)["map"] == results["map"]
    log.write_text(whole)
    assert (workdir / "report" / "index.html").exists()
    assert {path.name: path.read_bytes() for path in (workdir / "report").glob("*.png")} == before


def test_a_run_of_an_earlier_version_is_measured_and_reported(run):
    """Its config lacks the fields that came later."""
    workdir, results = run
    path = workdir / "config.json"
    whole = path.read_text()
    path.write_text(
        json.dumps({name: value for name, value in json.loads(whole).items() if name not in ("report", "compare")})
    )
    assert evaluate(workdir, overrides={"report.write": False}, console=QUIET)["map"] == results["map"]
    path.write_text(whole)


def test_pictures_that_are_no_longer_drawn_are_removed(tmp_path):
    for name in ("stale.png", "stale.pdf", "new.pdf"):
        (tmp_path / name).write_bytes(b"")
    sections = [Section("Pictures", [Picture("new", b"png", "title")])]
    path = report.write_page(tmp_path, "\udce9", "lead", [], sections, notes=[], config=small.config())
    assert sorted(file.name for file in path.parent.iterdir()) == ["index.html", "new.png"]
    assert "\\udce9" in path.read_text(encoding="utf-8")
