"""Comparisons: every cell once, whoever takes it; the tables from the cells; mistakes before anything runs."""

import csv
import json
import pathlib
import statistics

import jax
import numpy as np
import pytest
import rich.console

import cib_jax as cib
from cib_jax.baselines import BASELINES
from cib_jax.commands import compare as compare_lib
from cib_jax.commands.compare import compare, make_cell, make_tables, parse_methods
from cib_jax.commands.evaluate import evaluate
from cib_jax.commands.train import train
from cib_jax.errors import ConfigError, WorkdirError
from cib_jax.losses import OBJECTIVES
from cib_jax.runs import workdir
from configs import cifar
from tests import pretrained, small
from tests.commands import many
from tests.small import reference_map

QUIET = rich.console.Console(quiet=True)


def compared(folder, methods="lsh, itq, cibhash", **fields):
    fields = {"compare__bits": "8, 16", "compare__seeds": "0, 1", "compare__workers": 1} | fields
    return many.config(folder, compare__methods=methods, **fields)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return folder, compare(compared(folder, report__write=True), folder / "table", console=QUIET)


def test_a_cell_holds_the_mean_and_deviation_of_its_seeds(done):
    folder, comparison = done
    by_row = {
        (row["method"], bits): (row["mean"][at], row["deviation"][at])
        for row in comparison["tables"][0]["rows"]
        for at, bits in enumerate((8, 16))
    }
    for method, slug in (("LSH", "lsh"), ("ITQ", "itq"), ("CIBHash", "cibhash")):
        for bits in (8, 16):
            places = [folder / "table" / "cells" / slug / f"{bits}-bits-seed-{seed}" for seed in (0, 1)]
            values = [reference_map(place, 50) for place in places]
            assert by_row[method, bits] == pytest.approx((statistics.fmean(values), statistics.stdev(values)))


def test_the_tables_are_the_papers_two(done, tmp_path):
    """The second one where several of its objectives are compared."""
    _, comparison = done
    assert [[row["method"] for row in table["rows"]] for table in comparison["tables"]] == [["LSH", "ITQ", "CIBHash"]]
    assert comparison["missing"] == []
    config, rows = compared(tmp_path), parse_methods("lsh, itq, cl_hash, cibhash")
    maps = {"LSH": 0.1, "ITQ": 0.2, "CLHash": 0.3, "CIBHash": 0.4}
    records = [
        {"method": method, "bits": bits, "map": map + bits, "k": 50} for method, map in maps.items() for bits in (8, 16)
    ]
    assert [
        {row.title: [cell.values for cell in row.cells] for row in table.rows}
        for table in make_tables(config, rows, records)
    ] == [
        {title: [[maps[title] + bits] for bits in (8, 16)] for title in titles}
        for titles in (("LSH", "ITQ", "CIBHash"), ("CLHash", "CIBHash"))
    ]


def test_nested_codes_are_trained_once_for_all_lengths(tmp_path):
    fields = {"compare__bits": "8, 16, 20", "compare__seeds": "0", "epochs": 1}
    comparison = compare(compared(tmp_path, "cibhash nested=True", **fields), tmp_path / "table", console=QUIET)
    cells = sorted(path.name for path in (tmp_path / "table" / "cells").glob("cibhash*/*"))
    assert cells == ["20-bits-seed-0", "8-bits-seed-0"]  # nested codes begin at 16 bits
    assert (tmp_path / "table" / "comparison.md").exists() and not (tmp_path / "table" / "report").exists()
    [whole] = (tmp_path / "table" / "cells").glob("cibhash*/20*/results.json")
    maps = json.loads(whole.read_text())["metrics"]["map_of_first_bits"]
    assert comparison["tables"][0]["rows"][0]["mean"][1:] == pytest.approx([maps["16"], maps["20"]])


def test_cells_of_each_length_have_the_map_of_their_own_runs_alone(tmp_path):
    """Baselines, which a nested config does not nest, and nested codes of a length that is not within the longest."""
    fields = {"compare__bits": "16, 24, 32", "compare__seeds": "0", "epochs": 1, "nested": True}
    comparison = compare(compared(tmp_path, "lsh, cibhash", **fields), tmp_path / "table", console=QUIET)
    for row, slug in zip(comparison["tables"][0]["rows"], ("lsh", "cibhash"), strict=True):
        runs = {int(path.name.partition("-")[0]): path for path in (tmp_path / "table" / "cells" / slug).iterdir()}
        assert sorted(runs) == ([16, 24, 32] if slug == "lsh" else [24, 32])
        maps = {bits: json.loads((path / "results.json").read_text()) for bits, path in runs.items()}
        first = maps[32]["metrics"]["map_of_first_bits"]["16"] if slug == "cibhash" else maps[16]["map"]
        assert row["mean"] == pytest.approx([first, maps[24]["map"], maps[32]["map"]])
        assert row["seeds"] == [1, 1, 1]


def test_codes_of_batches_of_any_size_are_the_same(tmp_path, monkeypatch):
    """Batches that are larger than a part of the features."""
    maps = []
    monkeypatch.setattr("cib_jax.runs.features.PART", 128)
    for name, size in (("a", 64), ("b", 1000)):
        config = compared(tmp_path, "lsh", compare__bits="8", compare__seeds="0", encode_batch=size)
        maps += [cell["map"] for cell in compare(config, tmp_path / name, console=QUIET)["cells"]]
    assert maps[0] == maps[1]


def test_the_files_say_the_same(done):
    folder, comparison = done
    rows = list(csv.DictReader((folder / "table" / "comparison.csv").open()))
    assert len(rows) == 12 and {row["method"] for row in rows} == {"LSH", "ITQ", "CIBHash"}
    assert float(rows[0]["map"]) == comparison["cells"][0]["map"]
    of_lsh = comparison["tables"][0]["rows"][0]
    words = f"{of_lsh['mean'][0]:.3f} ± {of_lsh['deviation'][0]:.3f}"
    assert words in (folder / "table" / "comparison.md").read_text()
    assert words.replace("±", r"$\pm$") in (folder / "table" / "comparison.tex").read_text()
    assert json.loads((folder / "table" / "comparison.json").read_text()) == comparison
    assert (folder / "table" / "report" / "methods.png").exists() and (
        folder / "table" / "report" / "index.html"
    ).exists()


def test_what_is_measured_stays_and_more_is_added(done):
    folder, comparison = done
    table = folder / "table"
    before = {path: path.stat().st_mtime_ns for path in table.glob("cells/*/*/results.json")}
    more = compare(compared(folder, "lsh, pca_sign, cibhash"), table, console=QUIET)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {"LSH", "PCA sign", "CIBHash"} == {cell["method"] for cell in more["cells"]}
    assert more["cells"][0] == comparison["cells"][0]


def test_a_cell_is_the_run_that_train_makes(done, tmp_path):
    folder, comparison = done
    alone = train(many.config(folder, bits=16, seed=1, objective="cibhash"), tmp_path / "alone", console=QUIET)
    of_cell = [c for c in comparison["cells"] if (c["method"], c["bits"], c["seed"]) == ("CIBHash", 16, 1)]
    assert of_cell[0]["map"] == alone["map"]
    # And a cell is a run like any other, with a report for the asking.
    again = evaluate(of_cell[0]["workdir"], overrides={"report.write": True, "report.embedded": 0}, console=QUIET)
    assert again["map"] == alone["map"]
    assert (pathlib.Path(of_cell[0]["workdir"]) / "report" / "index.html").exists()


@pytest.mark.slow
def test_several_processes_share_the_cells(done, tmp_path):
    """Of one process, with a cell that another one has: below. Of several ones: tests/runs/test_processes.py.

    A comparison of two processes begins and is interrupted in tests/end_to_end/test_run.py.
    """
    folder, alone = done
    console = rich.console.Console(record=True, width=200)
    comparison = compare(compared(folder, "lsh, itq", compare__workers=2), tmp_path / "t", console=console)
    assert console.export_text().count(" of 8 complete: ") == 8  # whoever measured them
    assert len(comparison["cells"]) == 8 and not comparison["missing"]
    of_baselines = [cell["map"] for cell in alone["cells"] if cell["method"] in ("LSH", "ITQ")]
    assert [cell["map"] for cell in comparison["cells"]] == of_baselines


def test_a_cell_that_another_process_is_at_is_left_to_it(tmp_path):
    config = compared(tmp_path, "lsh, pca_sign", compare__seeds="0", compare__bits="8")
    console = rich.console.Console(record=True, width=200)
    with workdir.claim_workdir(tmp_path / "t" / "cells" / "lsh" / "8-bits-seed-0"):
        workdir.write_json(tmp_path / "t" / "config.json", config.to_dict())
        comparison = compare(config, tmp_path / "t", console=console)
    assert [cell["method"] for cell in comparison["cells"]] == ["PCA sign"]
    assert comparison["missing"][0]["method"] == "LSH"
    assert "Left to other processes: 1 cell;" in console.export_text()
    assert len(compare(config, tmp_path / "t", console=QUIET)["cells"]) == 2


def test_a_method_that_cannot_is_told_and_the_others_go_on(tmp_path):
    config = compared(tmp_path, "pca_sign, lsh", compare__bits="16, 32", compare__seeds="0")
    console = rich.console.Console(record=True, width=300)
    comparison = compare(config, tmp_path / "t", console=console)
    assert [(cell["method"], cell["bits"]) for cell in comparison["cells"]] == [
        ("PCA sign", 16),
        ("LSH", 16),
        ("LSH", 32),
    ]
    assert all(part in comparison["missing"][0]["why"] for part in ("pca_sign", "bits", "24", "32"))
    said = console.export_text()
    assert said.count("Refused: PCA sign, 32 bits, seed 0") == 1
    # The same command tries it again, as the reason may be gone.
    note = tmp_path / "t" / "cells" / "pca_sign" / "32-bits-seed-0" / compare_lib.REFUSED
    before = json.loads(note.read_text())["when"]
    compare(config, tmp_path / "t", console=QUIET)
    assert json.loads(note.read_text())["when"] > before
    assert "| PCA sign | " in (tmp_path / "t" / "comparison.md").read_text()
    assert "–" in (tmp_path / "t" / "comparison.md").read_text()


def test_rows_may_set_fields(tmp_path):
    assert set(OBJECTIVES) <= set(compare_lib.TITLES)
    rows = parse_methods("itq, cibhash, cibhash temperature=0.5 beta=0")
    assert [row.title for row in rows] == ["ITQ", "CIBHash", "CIBHash temperature=0.5 beta=0.0"]
    made = make_cell(many.config(tmp_path), rows[2], 16, 3, tmp_path)
    assert (made.config.temperature, made.config.beta, made.config.bits, made.config.seed) == (0.5, 0.0, 16, 3)
    assert made.config.objective == "cibhash" and made.workdir.parent.name.startswith(
        "cibhash-temperature=0.5-beta=0.0-"
    )
    slugs = {row.slug for row in parse_methods("lsh cache.dir=a/b, lsh cache.dir=a_b, lsh")}
    assert len(slugs) == 3 and all("/" not in slug for slug in slugs)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ("itqq", r"'itqq'.*did you mean itq\?"),
        ("itq, itq", "'itq'"),
        (" , ", "itq"),
        ("cibhash temp=3", "cibhash temp=3"),
        ("cibhash temperature", "cibhash temperature"),
        ("cibhash temperature=hot", "temperature=hot"),
        ("cibhash temperature=-1", "-1.0"),
        ("cibhash bits=16", "bits=16"),
        ("lsh k=10", "k=10"),
        ("lsh data.train_images=10", "data.train_images=10"),
        ("cibhash frozen=yes", "'yes'"),
        ("cibhash compare.bits=8", "compare.bits=8"),
        ("itq, sdc learning_rate=0.1", "sdc learning_rate=0.1.*no effect on SDC"),
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path, methods, words):
    with pytest.raises(ConfigError, match=f"config.compare.methods.*{words}"):
        compare(compared(tmp_path, methods), tmp_path / "t", console=QUIET)
    assert not (tmp_path / "t").exists()


def test_what_is_wrong_with_all_cells_is_told_once(tmp_path):
    config = compared(tmp_path, data__dir=str(tmp_path / "gone.npy"))
    with pytest.raises(cib.Refusal, match=r"config.data.dir: .*gone.npy"):
        compare(config, tmp_path / "t", console=QUIET)
    config = compared(tmp_path, "lsh, cibhash batch_size=512", compare__bits="8", compare__seeds="0")
    comparison = compare(config, tmp_path / "u", console=QUIET)
    assert [cell["method"] for cell in comparison["cells"]] == ["LSH"]
    assert "config.batch_size" in comparison["missing"][0]["why"]
    assert compare(config, tmp_path / "u", console=QUIET)["missing"] == comparison["missing"]


def refuse(*arguments, **options):
    raise ConfigError("config.k is too large", field="config.k")


def test_a_row_that_was_refused_is_measured_once_it_is_possible(tmp_path):
    config = compared(tmp_path, "lsh, cibhash", compare__bits="8", compare__seeds="0", epochs=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compare_lib, "train", refuse)
        before = compare(config, tmp_path / "t", console=QUIET)
    assert [cell["method"] for cell in before["cells"]] == ["LSH"]
    after = compare(config, tmp_path / "t", console=QUIET)
    assert [cell["method"] for cell in after["cells"]] == ["LSH", "CIBHash"] and not after["missing"]


def test_a_reason_that_all_rows_share_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compare_lib, "train", refuse)
        patched.setattr(compare_lib, "measure_baseline", refuse)
        with pytest.raises(ConfigError, match=r"^config\.k is too large"):
            compare(compared(tmp_path, compare__bits="8", compare__seeds="0"), tmp_path / "t", console=QUIET)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("field", ["compare__bits", "compare__seeds"])
def test_lists_of_numbers_are_checked(tmp_path, field):
    with pytest.raises(ConfigError, match=field.replace("__", ".")):
        compare(compared(tmp_path, **{field: "16; 32"}), tmp_path / "t", console=QUIET)
    if field == "compare__bits":
        with pytest.raises(ConfigError, match=r"config.bits.*0"):
            compare(compared(tmp_path, compare__bits="0"), tmp_path / "t", console=QUIET)


def test_a_folder_is_one_comparison_or_one_run(done, tmp_path):
    folder, _ = done
    with pytest.raises(WorkdirError, match=r"epochs: 2 → 3"):
        compare(compared(folder, epochs=3), folder / "table", console=QUIET)
    with pytest.raises(WorkdirError, match="comparison"):
        train(many.config(folder), folder / "table", console=QUIET)
    train(many.config(folder, epochs=1), tmp_path / "run", console=QUIET)
    with pytest.raises(WorkdirError, match="comparison"):
        compare(compared(folder), tmp_path / "run", console=QUIET)


def test_baselines_of_a_network_from_scratch_see_its_pixels(tmp_path):
    """Against the fit on pixels scaled by hand."""
    config = small.config(bits=16, k=100, image_size=8)  # as they are stored: nothing is resized
    results = compare_lib.measure_baseline(config, "pca_sign", tmp_path / "b", console=QUIET)
    assert (results["objective"], results["source"]) == ("pca_sign", BASELINES["pca_sign"].source)
    from cib_jax.config import build

    splits = build.draw_splits(config)
    train_pixels, query = (
        np.stack([part.images[i] for i in range(len(part))]).reshape(len(part), -1) / 127.5 - 1
        for part in (splits.train, splits.query)
    )
    found = BASELINES["pca_sign"].fit(train_pixels.astype(np.float32), 16, jax.random.key(0))
    expected = np.asarray(cib.pack_bits(found(query.astype(np.float32))))
    same = np.unpackbits(expected ^ np.load(tmp_path / "b" / "codes" / "query_codes.npy")).mean()
    assert same < 1e-3  # a bit on the edge may fall to either side
    assert compare_lib.measure_baseline(config, "pca_sign", tmp_path / "b", console=QUIET) == json.loads(
        (tmp_path / "b" / "results.json").read_text()
    )


@pytest.mark.usefixtures("few_digits")
def test_a_baseline_that_learns_from_views_takes_the_view_bank(tmp_path, monkeypatch):
    fields = small.FEW_DIGITS | pretrained.convnet(monkeypatch, tmp_path, 8)
    config = small.config(bits=8, train__views=3, **fields)
    results = compare_lib.measure_baseline(config, "crovca", tmp_path / "b", console=QUIET)
    assert results["source"] == BASELINES["crovca"].source
    assert results["map"] == pytest.approx(small.reference_map(tmp_path / "b", 100))
    assert results["map"] > 0.15  # chance gives 0.1


def test_a_baseline_that_learns_from_views_gets_some_where_no_backbone_is_frozen(tmp_path):
    for name, config in {"pixels": small.config(bits=8), "features": many.config(tmp_path, bits=8)}.items():
        results = compare_lib.measure_baseline(config, "crovca", tmp_path / name, console=QUIET)
        assert results["map"] == pytest.approx(small.reference_map(tmp_path / name, config.k))
        assert results["map"] > {"pixels": 0.2, "features": 0.5}[name]  # chance gives 0.1 and 1/3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train__views": 0}, r"config.train.views must be at least 2 with a frozen backbone, got 0"),
        (
            {"frozen": False, "train__bank_mb": 0},
            r"config.train.bank_mb must be at least 1, for 10 views of 130 images",
        ),
    ],
)
def test_a_baseline_that_learns_from_views_is_refused_without_them(fields, words, tmp_path, monkeypatch):
    frozen = pretrained.convnet(monkeypatch, tmp_path, 8)
    with pytest.raises(ConfigError, match=words):
        compare_lib.measure_baseline(small.config(bits=8, **frozen | fields), "crovca", tmp_path / "b", console=QUIET)


def test_cells_of_several_data_make_no_table(tmp_path):
    config = compared(tmp_path, "lsh", compare__seeds="0", compare__bits="8")
    compare(config, tmp_path / "t", console=QUIET)
    features = np.load(tmp_path / "features.npy")
    np.save(tmp_path / "other.npy", features[:200])
    np.save(tmp_path / "other.labels.npy", np.arange(200) % 3)
    config.data.dir, config.compare.methods = str(tmp_path / "other.npy"), "lsh, itq"
    with pytest.raises(WorkdirError, match=r"config.data.dir"):
        compare(config, tmp_path / "t", console=QUIET)


def test_a_baselines_folder_is_no_run(done):
    folder, _ = done
    place = folder / "table" / "cells" / "lsh" / "8-bits-seed-0"
    with pytest.raises(WorkdirError, match="baseline"):
        evaluate(place, console=QUIET)
    with pytest.raises(WorkdirError, match="baseline"):
        train(many.config(folder, bits=8), place, console=QUIET)


def test_published_rows_need_the_whole_protocol(tmp_path):
    """Quoted figures beside a run that departs from their protocol would invite a comparison that cannot be made."""
    config, rows = cifar.get_config(), parse_methods("itq")
    records = [{"method": "ITQ", "bits": 16, "map": 0.5, "k": 1000}]
    assert sum(row.published for row in make_tables(config, rows, records)[0].rows) == 3
    config.data.train_per_class = 100
    assert not any(row.published for row in make_tables(config, rows, records)[0].rows)
