"""Several processes at one run: the bits of one process, whatever ends any of them, wherever it goes on."""

import json
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest
import rich.console

from cib_jax import files
from cib_jax.commands.evaluate import evaluate
from cib_jax.commands.train import train
from cib_jax.inference.hasher import Hasher
from cib_jax.runs.workdir import claim_workdir
from tests import small
from tests.commands import many
from tests.end_to_end.processes import ENVIRONMENT, OPTIMIZED, finish, run, start, wait_until, with_devices

QUIET = rich.console.Console(quiet=True)
# Read as they are needed, so that each process reads its part of every batch, and validated while training.
STREAMED = {"data__resident_mb": 0, "epochs": 16, "data__validation": "database", "train__validate_every": 4}
# Photos, for the slow tests.
LONG = {"data__resident_mb": 0, "epochs": 16, "train__checkpoint_every": 2}


def trained(workdir):
    """Returns the parameters of a run."""
    return jax.tree.leaves(Hasher.load(workdir).params)


def same_parameters(one, other):
    return all(np.array_equal(a, b) for a, b in zip(trained(one), trained(other), strict=True))


def epochs_logged(workdir):
    log = workdir / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def killed(workdir, victim, arguments, epochs, environment=ENVIRONMENT):
    """Kills one of two processes when epochs are logged."""
    processes = start(2, *arguments, f"--workdir={workdir}", environment=environment)
    wait_until(processes, lambda: epochs_logged(workdir) >= epochs)
    processes[victim].send_signal(signal.SIGKILL)
    ends = finish(processes, timeout=120)
    assert ends[victim][0] == -signal.SIGKILL
    # Usually our own sentence; JAX's own watch over the first process may come before it.
    code, _, error = ends[1 - victim]
    assert code in (75, -signal.SIGABRT) and (
        "another process of this run ended" in error or "JAX distributed" in error
    )
    assert not (workdir / "results.json").exists()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of two processes, one of them told to end, that one process with two devices finished.

    Returns also how the two ended, what was left then and a copy of that, and what the last process printed.
    """
    folder = tmp_path_factory.mktemp("ended")
    arguments = many.flags(folder, **STREAMED)
    processes = start(2, *arguments, f"--workdir={folder / 'run'}")
    wait_until(processes, lambda: epochs_logged(folder / "run") >= 1)
    processes[1].send_signal(signal.SIGTERM)
    ends = finish(processes)
    left = epochs_logged(folder / "run")
    shutil.copytree(folder / "run", folder / "copy")
    return folder, ends, left, run(1, *arguments, f"--workdir={folder / 'run'}", environment=with_devices(2))


def test_sigterm_to_one_process_saves_at_one_step_in_all_and_one_process_goes_on(ended):
    _, ends, left, out = ended
    assert [code for code, _, _ in ends] == [75, 75], ends
    assert "Stopped by SIGTERM: " in ends[0][2] and "is saved in" in ends[0][2]
    assert left < 16 and "Going on after " in out


def test_two_processes_of_slurm_go_on_to_the_bits_of_one(tmp_path, ended):
    """To the parameters, codes and figures of two devices, and nearly to those of one that was never stopped."""
    folder, mine, alone = ended[0], ended[0] / "copy", ended[0] / "run"
    arguments = many.flags(folder, **STREAMED)
    out = run(2, *arguments, f"--workdir={mine}", slurm=True)
    assert "Going on " in out and "2 processes with 2 devices share each batch" in out
    assert same_parameters(mine, alone)
    for name in ("query_codes", "database_codes"):
        assert np.array_equal(*(np.load(workdir / "codes" / f"{name}.npy") for workdir in (mine, alone)))
    figures, others = results(mine), results(alone)
    assert figures["map"] == pytest.approx(others["map"], abs=1e-12)
    for curve in ("precision", "recall"):
        lists = [found["metrics"]["precision_recall"][curve] for found in (figures, others)]
        np.testing.assert_allclose(*lists, rtol=1e-12)
    assert figures["metrics"]["queries"] == others["metrics"]["queries"] == figures["counts"]["query"]
    assert figures["best_validation_map"] == pytest.approx(others["best_validation_map"], abs=1e-12)
    # On features, whose gradients no rounding near zero makes whole steps of, one device comes to nearly the same.
    train(many.config(folder, **STREAMED), tmp_path / "one", console=QUIET)
    logs = [[json.loads(line) for line in (place / "metrics.jsonl").open()] for place in (mine, tmp_path / "one")]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], abs=1e-5)
    for one, other in zip(trained(mine), trained(tmp_path / "one"), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_killed_hard_one_process_ends_the_other_whose_run_goes_on_to_the_same(tmp_path, ended):
    """By an error that stands for the one of a lost process: tests/runs/test_processes.py."""
    arguments = many.flags(ended[0], **STREAMED)
    killed(tmp_path / "run", 1, arguments, epochs=2)
    run(2, *arguments, f"--workdir={tmp_path / 'run'}")
    assert same_parameters(tmp_path / "run", ended[0] / "run")


@pytest.mark.slow
def test_two_processes_evaluate_a_run(ended):
    """The head takes the mean and deviation of its checkpoint, which all processes must open together."""
    workdir = ended[0] / "run"
    out = run(2, "--mode=evaluate", f"--workdir={workdir}", "--config.k=20")
    assert "MAP@20 " in out
    alone = evaluate(workdir, overrides={"k": 20}, console=QUIET)
    assert f"{alone['map']:.3f}" in out  # bits on the edge may fall to either side


@pytest.mark.slow
def test_two_processes_refuse_a_run_in_use(ended):
    """In one process: tests/commands/test_train.py; that an error of one ends all: tests/distributed."""
    workdir = ended[0] / "run"
    with claim_workdir(workdir):  # as another process does
        ends = finish(start(2, "--mode=evaluate", f"--workdir={workdir}"))
    assert [code for code, _, _ in ends] == [2, 2], ends
    assert [str(workdir) in error for _, _, error in ends] == [True, False], "the first one alone says why"
    assert "Traceback" not in ends[0][2] + ends[1][2]


@pytest.mark.slow
def test_two_processes_share_a_teacher_and_come_to_its_losses(tmp_path):
    """Streamed photos, whose coordinates go along with each process's part of a batch."""
    fields = {
        "objective": "diffusion",
        "epochs": 2,
        "data__resident_mb": 0,
        "teacher__bits": 16,
        "teacher__dimensions": 8,
    }
    train(small.config(**fields), tmp_path / "1", console=QUIET)
    run(2, *small.flags(**fields), f"--workdir={tmp_path / '2'}")
    for part in (".", "teacher"):
        logs = [(tmp_path / count / part / "metrics.jsonl").read_text().splitlines() for count in "12"]
        for mine, alone in zip(*(map(json.loads, log) for log in logs), strict=True):
            assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-2)
    kept = [np.load(tmp_path / count / "teacher" / "coordinates.npy") for count in "12"]
    np.testing.assert_allclose(kept[0] @ kept[0].T, kept[1] @ kept[1].T, atol=0.2)


@pytest.mark.slow
def test_what_one_process_refuses_while_training_ends_the_other_alike(tmp_path):
    """The checkpoints are taken over by somebody else, which the first process alone looks at."""
    place = tmp_path / "checkpoints"
    fields = {"train__checkpoint_dir": place, "epochs": 3000}
    processes = start(2, *many.flags(tmp_path, **fields), f"--workdir={tmp_path / 'run'}")
    wait_until(processes, lambda: epochs_logged(tmp_path / "run") >= 2)
    with files.replacing(place / "owner.json") as part:  # never half there to who looks at it each few steps
        part.write_text(json.dumps({"workdir": "/elsewhere", "session": "another"}))
    told = finish(processes)
    assert [code for code, _, _ in told] == [2, 2], told
    sentence, pointer = "a run in /elsewhere has taken over the checkpoints", "refused; the first process says why"
    assert sentence in told[0][2] and all(sentence in error or pointer in error for _, _, error in told), told


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The long run on one process with two devices."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(1, *small.flags(**LONG), f"--workdir={workdir}", environment=with_devices(2, OPTIMIZED))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_hard_one_process_ends_the_others_and_all_go_on_to_the_undisturbed(tmp_path, undisturbed, victim):
    arguments = small.flags(**LONG)
    killed(tmp_path / "run", victim, arguments, epochs=5, environment=OPTIMIZED)
    # On two processes again, or on one.
    out = run(2 - victim, *arguments, f"--workdir={tmp_path / 'run'}", environment=with_devices(1 + victim, OPTIMIZED))
    assert "Going on after " in out
    assert same_parameters(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_killed_at_any_moment_one_of_two_processes_ends_both_and_all_go_on_to_the_same(tmp_path, undisturbed, moment):
    draws = np.random.default_rng(moment)
    arguments = [*small.flags(**LONG | {"train__checkpoint_every": 1}), f"--workdir={tmp_path / 'run'}"]
    processes = start(2, *arguments, environment=OPTIMIZED)
    try:
        processes[moment % 2].wait(timeout=draws.uniform(0, 25))
    except subprocess.TimeoutExpired:
        processes[moment % 2].send_signal(signal.SIGKILL)
    told = finish(processes, timeout=400)
    code, _, error = told[1 - moment % 2]
    assert code in (75, -signal.SIGABRT) or (code == 2 and "did not come" in error), told
    run(2, *arguments, environment=OPTIMIZED)
    assert same_parameters(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(6))
def test_killed_during_a_save_one_of_two_processes_ends_the_other_with_75(tmp_path, undisturbed, moment):
    draws = np.random.default_rng(moment)
    arguments = [*small.flags(**LONG | {"train__checkpoint_every": 1}), f"--workdir={tmp_path / 'run'}"]
    processes = start(2, *arguments, environment=OPTIMIZED)
    epoch = draws.integers(1, 10)
    wait_until(
        processes,
        lambda: epochs_logged(tmp_path / "run") >= epoch and list(tmp_path.glob("run/checkpoints/*tmp*")),
    )
    processes[moment % 2].send_signal(signal.SIGKILL)
    told = finish(processes, timeout=400)
    assert told[1 - moment % 2][0] in (75, -signal.SIGABRT), told
    run(2, *arguments, environment=OPTIMIZED)
    assert same_parameters(tmp_path / "run", undisturbed)
