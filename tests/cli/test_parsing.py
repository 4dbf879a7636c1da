"""Command lines: the config file is found wherever --config stands, and mistakes name the flag."""

import pathlib
import shlex
import sys

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

import cib_jax
from cib_jax.cli import flags, parsing
from cib_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def parse(monkeypatch):
    """A function that parses arguments as run.py does; flags are restored."""

    def parsed(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        return parsing.parse(sys.argv)

    with flagsaver.flagsaver():
        yield parsed


def test_an_experiment_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {*parsing.config_names()} == {file.stem for file in (ROOT / "configs").glob("[!_]*.py")}
    (tmp_path / "cifar.py").write_text("")
    assert pathlib.Path(parsing.config_path("cifar")).samefile(ROOT / "configs" / "cifar.py")
    assert parsing.config_path("./cifar.py") == "./cifar.py"


@pytest.mark.parametrize(("given", "mentioned"), [("cifra", "cifar?"), ("./none.py", "'./none.py'"), (".", "'.'")])
def test_an_unknown_experiment_is_refused(given, mentioned):
    with pytest.raises(ConfigError) as caught:
        parsing.config_path(given)
    assert caught.value.field == "--config" and mentioned in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config=cifar", "--config.bits=16"),
        ("--config.bits=16", "--config", "cifar"),
        ("-config.bits=16", "--config=digits", "-config=cifar"),
    ],
)
def test_the_last_config_counts_wherever_it_stands(parse, arguments):
    assert parse(*arguments) == ["run.py", "cifar"]
    assert flags.CONFIG.value.data.name == "cifar10" and flags.CONFIG.value.bits == 16


@pytest.mark.parametrize(("mode", "data"), [("train", "digits"), ("index", "folder")])
def test_the_default_experiment_depends_on_the_mode(parse, mode, data):
    assert parse(f"--mode={mode}") == ["run.py"]
    assert flags.CONFIG.value.data.name == data


@pytest.mark.parametrize(("mode", "file"), [("search", "search.png"), ("duplicates", "duplicates.png")])
def test_show_alone_names_a_file_after_the_mode(parse, mode, file):
    parse(f"--mode={mode}", "--index=i", "--show")
    assert flags.SHOW.value == file
    parse(f"--mode={mode}", "--show=other.png", "--index=i")
    assert flags.SHOW.value == "other.png"


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (("--config",), "--config: "),
        (("--config=nothing",), "--config: "),
        (("--config.bit=16",), "--config.bit: "),
        (("--config.views=2",), "train.views"),
        (("--config.data=x",), "--config.data: "),
        (("--mode=sing",), "mode"),
        (("--k=many", "--mode=search"), "--k must be a whole number, got 'many'"),
        (("--port=1: 5", "--mode=serve"), "--port must be a whole number, got '1: 5'"),
        (("--config.data.dir",), "--config.data.dir: "),
        (("--mode=search", "--query"), "--query: "),
        (("--relearn=maybe", "--mode=index"), "--relearn must be True or False, got 'maybe'"),
        (("--format=xml", "--mode=search"), "--format must be one of table, json, csv, got 'xml'"),
        (("--config.learning_rate=fast",), "--config.learning_rate must be a number, got 'fast'"),
        (("--config.report.write=maybe",), "--config.report.write must be True or False, got 'maybe'"),
        (("--workdri=x",), "workdri"),
        (("folder",), "'folder'"),
        (("serch", "--index=i"), "did you mean search?"),
        (("--mode=serch", "--index=i"), "did you mean search?"),
        (("--bits=16",), "did you mean --config.bits?"),
        (("--patience=2",), "did you mean --config.train.patience?"),
        (("--workdri=x",), "did you mean --workdir?"),
    ],
)
def test_a_mistake_ends_in_one_sentence(parse, capsys, arguments, mentioned):
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and len(error.splitlines()) == 1
    assert error.startswith("run.py: ") and mentioned in error


@pytest.mark.parametrize("mode", flags.MODES)
def test_the_help_of_a_mode_has_an_example_and_its_flags(parse, capsys, mode):
    with pytest.raises(SystemExit) as ended:
        parse(mode, "--help")
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"  --{flag}: " in out for flag in ("config", *flags.MODES[mode].flags))
    assert ("  --config.train.patience=6 " in out) == (mode in (*flags.STARTING, "index"))
    example = flags.MODES[mode].example
    assert f" {mode} {example}" in out
    parse(mode, *shlex.split(example))
    assert flags.MODE.value == mode
    assert all(absl_flags.FLAGS[flag].value is not None for flag in flags.MODES[mode].required)


@pytest.mark.parametrize(("mode", "bits"), [("train", 32), ("index", 64)])
def test_help_has_the_defaults_of_the_mode(parse, capsys, mode, bits):
    with pytest.raises(SystemExit):
        parse(mode, "--help")
    out = capsys.readouterr().out
    assert f"  --config.bits={bits} " in out
    assert ('  --config.backbone="efficientnet_lite0" ' in out) == (mode == "index")


@pytest.mark.parametrize("width", [80, 100])
def test_help_fits_the_terminal(parse, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        parse("train", "--help")
    shown = capsys.readouterr().out
    assert all(len(line) <= width or " " not in line.strip() for line in shown.splitlines())
    assert "--config.temperature=" in shown.split("Fields:")[1]


def test_the_version_is_printed(parse, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--version")
    assert ended.value.code == 0 and capsys.readouterr().out == f"cib-jax {cib_jax.__version__}\n"


def test_a_config_file_that_fails_is_named(parse, capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(SystemExit):
        parse(f"--config={path}")
    error = capsys.readouterr().err
    assert str(path) in error and "ZeroDivisionError" in error
