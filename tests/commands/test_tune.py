"""Searches for hyper-parameters: what they draw, that they go on to the same, and scores without labels."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import rich.console
import scipy.stats

import cib_jax as cib
from cib_jax import errors
from cib_jax.commands import tune
from cib_jax.commands.train import train
from cib_jax.errors import ConfigError, WorkdirError
from cib_jax.files import install_command
from cib_jax.runs import workdir
from configs import digits
from tests import pretrained, small
from tests.commands import many

QUIET = rich.console.Console(quiet=True)


def searched(folder, **fields):
    defaults = {
        "data__validation": "database",
        "train__validate_every": 1,
        "tune__space": "temperature=0.2..0.6, beta=1e-4..1e-1 log, batch_size=16|32",
        "tune__trials": 4,
        "tune__images": 60,
        "tune__sampler": "random",
        "tune__score": "validation_map",
        "tune__workers": 1,
    }
    return many.config(folder, **defaults | fields)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    console = rich.console.Console(record=True, width=300)
    return folder, tune.tune(searched(folder, report__write=True), folder / "s", console=console), console.export_text()


def test_the_best_is_the_trial_of_highest_score(done):
    folder, search, told = done
    values = [trial["value"] for trial in search["trials"]]
    assert len(values) == 4 and search["best"]["value"] == max(values)
    for trial in search["trials"]:
        results = json.loads((folder / "s" / "trials" / f"{trial['number']:04}" / "results.json").read_text())
        assert trial["value"] == results["best_validation_map"] and trial["scores"]["map"] == results["map"]
        config = json.loads((folder / "s" / "trials" / f"{trial['number']:04}" / "config.json").read_text())
        assert {name: config[name] for name in trial["params"]} == trial["params"]
    assert f"--config.temperature={search['best']['params']['temperature']}" in told


def test_the_report_has_the_heat_map_and_what_tracks_map(done):
    folder, _, _ = done
    drawn = {path.stem for path in (folder / "s" / "report").glob("*.png")}
    assert drawn == {"search", "parameters", "sensitivity", "label_free_map", "label_free_validation_map"}
    rows = (folder / "s" / "search.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("trial,temperature,beta,batch_size,separation")


def test_rank_correlations_are_scipys(done):
    _, search, _ = done
    for against, found in search["rank_correlation"].items():
        for name, value in found.items():
            columns = [[trial["scores"][key] for trial in search["trials"]] for key in (name, against)]
            assert value == pytest.approx(scipy.stats.spearmanr(*columns).statistic)
    assert list(search["rank_correlation"]) == ["validation_map", "map"]


def cut_in(folder, number, trials):
    """Makes a search look as if it had been killed in a trial, after its training."""
    for later in range(number + 1, trials):
        shutil.rmtree(folder / "trials" / f"{later:04}")
    (folder / "trials" / f"{number:04}" / tune.TRIAL).unlink()


def test_a_search_taken_up_again_comes_to_the_same_and_more_trials_go_on(done, tmp_path):
    folder, search, _ = done
    shutil.copytree(folder / "s", tmp_path / "cut")
    cut_in(tmp_path / "cut", 2, 4)
    more = tune.tune(searched(folder, tune__trials=5), tmp_path / "cut", console=QUIET)
    assert more["trials"][:4] == search["trials"] and len(more["trials"]) == 5
    with pytest.raises(WorkdirError, match=r"tune.space"):
        tune.tune(searched(folder, tune__space="temperature=0.1..0.9"), tmp_path / "cut", console=QUIET)


@pytest.fixture
def formula(monkeypatch):
    """A formula for the score, where only draws and files are looked at."""

    def trained(config, folder, **_):
        value = -abs(config.temperature - 0.4) - config.beta
        return {"best_validation_map": value, "map": value}

    monkeypatch.setattr(tune, "train", trained)
    monkeypatch.setattr(tune, "label_free_scores", lambda *_: dict.fromkeys(tune.SCORES, 0.0))


@pytest.mark.usefixtures("formula")
def test_a_search_that_learns_from_earlier_trials_comes_to_the_same(tmp_path):
    config = searched(tmp_path, tune__sampler="tpe", tune__trials=16)
    whole = tune.tune(config, tmp_path / "whole", console=QUIET)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut_in(tmp_path / "cut", 3, 16)
    assert tune.tune(config, tmp_path / "cut", console=QUIET)["trials"] == whole["trials"]


@pytest.mark.usefixtures("formula")
def test_a_grid_tries_every_pair_once(tmp_path):
    config = searched(tmp_path, tune__space="temperature=0.2|0.5, beta=0.0|0.1", tune__sampler="grid", epochs=1)
    search = tune.tune(config, tmp_path / "s", console=QUIET)
    tried = [(trial["params"]["temperature"], trial["params"]["beta"]) for trial in search["trials"]]
    assert tried == [(0.2, 0.0), (0.2, 0.1), (0.5, 0.0), (0.5, 0.1)]


def test_people_without_labels_choose_by_a_score(tmp_path):
    config = searched(
        tmp_path,
        data__validation="none",
        data__labelled=False,
        tune__score="separation",
        tune__trials=2,
        epochs=1,
    )
    search = tune.tune(config, tmp_path / "s", console=QUIET)
    assert search["rank_correlation"] == {}
    assert search["best"]["value"] == max(trial["scores"]["separation"] for trial in search["trials"])
    assert all(trial["scores"]["map"] is None for trial in search["trials"])


def test_what_is_wrong_with_every_trial_is_told_at_the_first(tmp_path):
    config = searched(tmp_path, k=500)
    with pytest.raises(cib.Refusal, match=r"config.k.*500"):
        tune.tune(config, tmp_path / "s", console=QUIET)
    assert not list((tmp_path / "s").glob("trials/*/trial.json"))


def test_trials_that_another_process_is_at_are_left_to_it(tmp_path):
    config = searched(tmp_path, tune__trials=2, tune__sampler="tpe", epochs=1)
    (tmp_path / "s" / "trials").mkdir(parents=True)
    console = rich.console.Console(record=True, width=200)
    with workdir.exclusive(tmp_path / "s" / "trials" / "0000.lock"):
        assert tune.tune(config, tmp_path / "s", console=console)["best"] is None
    assert "Left to other processes: 2 trials;" in console.export_text()


def test_two_stored_views_are_two_different_ones(tmp_path):
    """Unrelated vectors: as each other's views they find each other by chance alone."""
    generator = np.random.default_rng(0)
    np.save(tmp_path / "stored.npy", generator.normal(size=(240, 2, 24)).astype(np.float32))
    config = many.config(tmp_path, data__dir=str(tmp_path / "stored.npy"), augment="stored", bits=64, epochs=1)
    train(config, tmp_path / "run", console=QUIET)
    scores = tune.label_free_scores(tmp_path / "run", 200)
    assert scores["view_agreement"] < 0.2 and scores == tune.label_free_scores(tmp_path / "run", 200)


def test_a_trial_that_fails_is_told_and_the_others_go_on(tmp_path):
    config = searched(tmp_path, tune__space="batch_size=16|256", tune__sampler="grid", epochs=1)
    console = rich.console.Console(record=True, width=300)
    search = tune.tune(config, tmp_path / "s", console=console)
    assert [trial["value"] is None for trial in search["trials"]] == [False, True]
    assert "Trial 2 failed: config.batch_size" in console.export_text()
    with pytest.raises(ConfigError, match=r"config\.tune\.space"):
        tune.tune(searched(tmp_path, tune__space="batch_size=256", tune__sampler="grid"), tmp_path / "t", console=QUIET)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("temprature=0.1..0.2", "temprature=0.1..0.2"),
        ("temperature", "temperature"),
        ("seed=1|2", "seed=1"),
        ("temperature=0.3..0.2", "temperature=0.3..0.2"),
        ("temperature=-1..1", "-1.0"),
        ("beta=0..1 log", "beta=0..1 log"),
        ("beta=0..1 logarithmic", "'logarithmic'"),
        ("beta=a..b", "'a'"),
        ("augment=photo..digits", "augment=photo..digits"),
        ("objective=cibhash|simclr", "'simclr'"),
        ("beta=0..1, beta=0..2", "beta=0..2"),
        ("k=10|1000", "k=10"),
        ("data.train_images=100|200", "data.train_images=100"),
    ],
)
def test_spaces_that_cannot_be_are_refused(tmp_path, words, part):
    with pytest.raises(ConfigError, match=f"config.tune.space.*{re.escape(part)}"):
        tune.tune(searched(tmp_path, tune__space=words), tmp_path / "s", console=QUIET)
    assert not (tmp_path / "s").exists()


def test_a_grid_of_ranges_and_a_search_that_cannot_validate_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.tune\.space") as error:
        tune.tune(searched(tmp_path, tune__sampler="grid"), tmp_path / "s", console=QUIET)
    assert error.value.field == "config.tune.space"
    with pytest.raises(ConfigError, match=r"config\.tune\.score") as error:
        tune.tune(searched(tmp_path, data__validation="none"), tmp_path / "s", console=QUIET)
    assert error.value.field == "config.tune.score"


def test_the_default_experiment_is_tuned_and_a_refused_search_claims_no_folder(tmp_path):
    """Refuses it for its depth of ranking alone, which the first trial finds out, and leaves nothing behind."""
    config = digits.get_config()
    config.k, config.cache.dir = 5000, "none"
    with pytest.raises(ConfigError) as error:
        tune.tune(config, tmp_path / "s", console=QUIET)
    assert error.value.field == "config.k"
    assert list(tmp_path.iterdir()) == []


def test_without_optuna_the_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(errors.MissingExtraError, match=re.escape(install_command("tune"))):
        tune.tune(searched(tmp_path), tmp_path / "s", console=QUIET)


def test_draws_lie_in_the_space_and_depend_on_the_number_alone():
    made = tune.parse_space("temperature=0.2..0.6, beta=1e-4..1e-1 log, train.views=2..5, batch_size=16|32")
    drawn = [tune.suggest(made, "random", 0, number, []) for number in range(200)]
    assert drawn == [tune.suggest(made, "random", 0, number, []) for number in range(200)]
    assert drawn != [tune.suggest(made, "random", 1, number, []) for number in range(200)]
    assert {one["train.views"] for one in drawn} == {2, 3, 4, 5} and {one["batch_size"] for one in drawn} == {16, 32}
    temperatures, betas = (np.array([one[name] for one in drawn]) for name in ("temperature", "beta"))
    assert (
        temperatures.min() >= 0.2 and temperatures.max() <= 0.6 and temperatures.mean() == pytest.approx(0.4, abs=0.03)
    )
    assert np.log10(betas).mean() == pytest.approx(-2.5, abs=0.2)
    assert all(f"{one['temperature']:.3g}" == str(one["temperature"]) for one in drawn)


def test_tpe_learns_from_earlier_trials():
    made = tune.parse_space("temperature=0.0001..1.0")
    earlier = []
    for number in range(40):
        params = tune.suggest(made, "tpe", 0, number, earlier)
        earlier.append((params, -abs(params["temperature"] - 0.7)))
    later = np.array([params["temperature"] for params, _ in earlier[25:]])
    assert np.abs(later - 0.7).mean() < 0.15  # 0.29 by chance


# From scratch, the features before hashing are pixels, as in a test of test_compare.py, and the views are computed
# together with their codes, as on stored views above.
@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("kind", [pytest.param("from scratch", marks=pytest.mark.slow), "frozen"])
def test_every_kind_of_network_is_scored(tmp_path, monkeypatch, kind):
    fields = {}
    if kind == "frozen":
        fields = pretrained.convnet(monkeypatch, tmp_path, 8) | {"train__views": 2}
    config = small.config(epochs=1, **small.FEW_DIGITS, **fields)
    train(config, tmp_path / "run", console=QUIET)
    found = tune.label_free_scores(tmp_path / "run", 60)
    assert found.keys() == tune.SCORES.keys()
    assert 0 < found["neighbour_agreement"] < 1 and 0 < found["view_agreement"] <= 1


CRAFTED = [
    (("number",), 7),
    (("params",), {}),
    (("params", "temperature"), "x"),
    (("params", "temperature"), 9.0),
    (("params", "temperature"), []),
    (("params", "batch_size"), 17),
    (("params", "other"), 1),
    (("scores",), {}),
    (("scores", "separation"), None),
    (("scores", "separation"), {}),
    (("scores", "map"), 10**30),
    (("scores", "validation_map"), True),
    (("value",), float("inf")),
    (("data",), []),
]


def test_a_crafted_trial_is_refused_in_a_sentence(done, tmp_path):
    """All of them by the same check, which a search makes of each trial."""
    folder, search, _ = done
    space = tune.parse_space(searched(folder).tune.space)
    for trial in (tune.Trial(number, folder / "s" / "trials" / f"{number:04}") for number in range(4)):
        assert tune.load_trial(trial, space) == search["trials"][trial.number]
    for path, value in CRAFTED:
        record = json.loads(json.dumps(search["trials"][0]))
        place = record
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        workdir.write_json(tmp_path / "trial.json", record)
        with pytest.raises(WorkdirError, match=r"trial\.json"):
            tune.load_trial(tune.Trial(0, tmp_path), space)
