"""A corpus encoded by several processes, as a user starts them: interrupted, misled; slow: killed and started again."""

import signal
import time

import numpy as np
import pytest
import rich.console

from cib_jax.cli.flags import MODES
from cib_jax.commands.encode import encode
from cib_jax.commands.train import train
from cib_jax.storage.code_store import read_corpus
from tests import small
from tests.command_line import ROOT, signal_once
from tests.data import pictures
from tests.end_to_end.processes import wait_until
from tests.end_to_end.test_run import finish, start

pytestmark = pytest.mark.usefixtures("compiled_to_run")

PHOTOS = 240


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, and a folder of photos it has not seen, some of them broken."""
    folder = tmp_path_factory.mktemp("corpus")
    train(small.config(epochs=1), folder / "run")
    contents = [pictures.content(pictures.smooth(640, 480, seed=number), "JPEG") for number in range(25)]
    for number in range(PHOTOS):
        path = folder / "photos" / f"{number % 7}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number % 25][: 2000 if number % 50 == 3 else None])
    return folder


def arguments(run, codes, *others, part=8):
    return [
        "--mode=encode",
        f"--workdir={run / 'run'}",
        f"--images={run / 'photos'}",
        f"--codes={codes}",
        f"--part={part}",
        *others,
    ]


def parts(codes):
    return len(list(codes.glob("part-*.parquet")))


@pytest.fixture(scope="module")
def undisturbed(run):
    codes, console = run / "undisturbed", rich.console.Console(record=True)
    encode(run / "run", run / "photos", codes, part=8, console=console)
    assert f"{PHOTOS} photos in 30 parts, 5 unreadable" in console.export_text()
    return read_corpus(codes)


def same(codes, undisturbed):
    paths, packed = read_corpus(codes)
    assert paths == undisturbed[0]
    assert np.array_equal(packed, undisturbed[1])
    assert not list(codes.glob(".*"))


@pytest.mark.slow
def test_of_three_processes_one_is_killed_and_started_again(run, undisturbed, tmp_path, run_cli):
    """In one process, by shares, an error at a photo and parts that are gone: tests/commands/test_encode.py."""
    codes = tmp_path / "codes"
    process = start(*arguments(run, codes, "--processes=3", "--process=0"))
    mine = [codes / f"part-{number:08}.parquet" for number in range(0, 30, 3)]
    wait_until([process], mine[1].exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path for path in mine if not path.exists()]
    assert left, "it was killed too late"
    for number in (1, 2):
        code, out, error = run_cli(*arguments(run, codes, "--processes=3", f"--process={number}"))
        assert code == 0 and " of 30 parts " in out and "is complete" not in out, error
    stays = {path: path.stat().st_mtime_ns for path in codes.glob("part-*")}
    code, out, error = run_cli(*arguments(run, codes, "--processes=3", "--process=0"))
    assert code == 0, error
    assert f"{PHOTOS} photos in 30 parts, 5 unreadable" in out and "is complete" in out
    assert all(path.stat().st_mtime_ns == when for path, when in stays.items())
    same(codes, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_killed_at_any_moment_the_same_command_goes_on(run, undisturbed, tmp_path, moment):
    """Two processes with the very same share, one killed during start-up, decoding, encoding and writing, twice."""
    generator = np.random.default_rng(moment)
    codes = tmp_path / "codes"
    beside = start(*arguments(run, codes)) if moment % 2 else None
    for _ in range(2):
        process = start(*arguments(run, codes))
        wanted = int(generator.integers(0, 29))
        pause = generator.uniform(0, 0.1)
        begun = time.monotonic()
        while parts(codes) < wanted and process.poll() is None and time.monotonic() - begun < 100:
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        finish(process)
    if beside:
        code, _, error = finish(beside)
        assert code == 0, error
    code, out, error = finish(start(*arguments(run, codes)))
    assert code == 0 and "is complete" in out, error
    same(codes, undisturbed)


def test_interrupted_by_its_user_it_ends_quietly(run, tmp_path, run_cli):
    with signal_once(signal.SIGINT, lambda: parts(tmp_path / "codes") > 2):
        code, _, error = run_cli(*arguments(run, tmp_path / "codes", part=1))
    assert (code, error.strip()) == (130, f"Interrupted; {MODES['encode'].after_interrupt}.")
    assert parts(tmp_path / "codes") < PHOTOS


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (["--workdir=nowhere", "--images=x", "--codes=y"], ["nowhere"]),
        (["--images=x", "--codes=y"], ["--workdir", "--mode=encode"]),
        (["--workdir=RUN", "--images=x"], ["--codes", "--mode=encode"]),
        (["--workdir=RUN", "--codes=y"], ["--images"]),
        (["--workdir=RUN", "--images=nowhere", "--codes=y"], ["--images", "nowhere"]),
        (["--workdir=RUN", "--images=x", "--codes=y", "--part=some"], ["--part ", "'some'"]),
        (["--workdir=RUN", "--images=x", "--codes=y", "--part=0"], ["--part", "0"]),
        (["--workdir=RUN", "--images=x", "--codes=y", "--process=1"], ["--processes", "--process=1"]),
        (["--workdir=RUN", "--images=x", "--codes=y", "--config.bits=32"], ["config.bits", "32", "16"]),
        (["--mode=evaluate", "--workdir=RUN", "--codes=y"], ["--codes", "--workdir"]),
    ],
)
def test_a_mistake_is_told_in_one_sentence(run, refusal, others, words):
    given = [argument.replace("RUN", str(run / "run")) for argument in others]
    sentence = refusal(*(["--mode=encode"] if "--mode=evaluate" not in given else []), *given)
    assert all(word in sentence for word in words)
    assert not (ROOT / "y").exists()
