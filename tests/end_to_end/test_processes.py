"""Several processes at one run: the bits of one process, whatever ends any of them, wherever it goes on."""

import json
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
# Images decoded as they are needed, so that each process reads its part of every batch, and validated while training.
STREAMED = {"data__resident_mb": 0, "epochs": 8, "data__validation": "database", "data__validation_queries": 100}
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


def killed(tmp_path, victim, fields, epochs, environment=ENVIRONMENT):
    """Kills one of two processes when epochs are logged; returns how a user goes on."""
    arguments = [*small.flags(**fields), f"--workdir={tmp_path / 'run'}"]
    processes = start(2, *arguments, environment=environment)
    wait_until(processes, lambda: epochs_logged(tmp_path / "run") >= epochs)
    processes[victim].send_signal(signal.SIGKILL)
    told = finish(processes, timeout=120)
    assert told[victim][0] == -signal.SIGKILL
    # Usually our own sentence; JAX's own watch over the first process may come before it.
    code, _, error = told[1 - victim]
    assert code in (75, -signal.SIGABRT) and (
        "another process of this run ended" in error or "JAX distributed" in error
    )
    assert not (tmp_path / "run" / "results.json").exists()
    return arguments


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of two processes, one of them told to end, that one process with two devices finished.

    The run below is cut at another moment and goes on elsewhere: both come to the same bits only if cuts show in none.
    """
    workdir = tmp_path_factory.mktemp("ended") / "run"
    arguments = [*small.flags(**STREAMED), f"--workdir={workdir}"]
    processes = start(2, *arguments)
    wait_until(processes, lambda: epochs_logged(workdir) >= 1)
    processes[1].send_signal(signal.SIGTERM)
    told = finish(processes)
    left = epochs_logged(workdir)
    return workdir, told, left, run(1, *arguments, environment=with_devices(2))


def test_sigterm_to_one_process_saves_at_one_step_in_all_and_one_process_goes_on(ended):
    _, told, left, out = ended
    assert [code for code, _, _ in told] == [75, 75], told
    assert "Stopped by SIGTERM: " in told[0][2] and "is saved in" in told[0][2]
    assert left < 8 and "Going on after " in out


def test_killed_hard_one_process_ends_the_other_and_two_come_to_the_bits_of_one(tmp_path, ended):
    """To its parameters, codes and figures."""
    arguments = killed(tmp_path, 1, STREAMED, epochs=2)
    said = run(2, *arguments)
    assert "Going on after " in said and "2 processes with 2 devices share each batch" in said
    mine, alone = tmp_path / "run", ended[0]
    assert same_parameters(mine, alone)
    for name in ("query_codes", "database_codes"):
        assert np.array_equal(*(np.load(workdir / "codes" / f"{name}.npy") for workdir in (mine, alone)))
    figures, others = results(mine), results(alone)
    assert figures["map"] == pytest.approx(others["map"], abs=1e-12)
    for curve in ("precision", "recall"):
        lists = [told["metrics"]["precision_recall"][curve] for told in (figures, others)]
        np.testing.assert_allclose(*lists, rtol=1e-12)
    assert figures["metrics"]["queries"] == others["metrics"]["queries"] == figures["counts"]["query"]
    assert figures["best_validation_map"] == pytest.approx(others["best_validation_map"], abs=1e-12)
    assert epochs_logged(mine) == 8
    # Measured again by one process alone, on one device.
    again = evaluate(mine, console=QUIET)
    assert again["map"] == pytest.approx(figures["map"], abs=1e-3)  # bits on the edge may fall to either side


def test_four_processes_come_to_the_losses_and_parameters_of_one_device(tmp_path):
    """On features, whose gradients no rounding near zero makes whole steps of."""
    train(many.config(tmp_path, epochs=3), tmp_path / "1", console=QUIET)
    fields = many.FEATURES | {"data__dir": str(tmp_path / "features.npy"), "epochs": 3}
    run(4, *small.flags(**fields), f"--workdir={tmp_path / '4'}", slurm=True)
    for mine, alone in zip(trained(tmp_path / "4"), trained(tmp_path / "1"), strict=True):
        np.testing.assert_allclose(mine, alone, atol=1e-5)
    logs = [(tmp_path / count / "metrics.jsonl").read_text().splitlines() for count in "14"]
    for mine, alone in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert mine["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    # The head takes the mean and deviation of its checkpoint, which all processes must open together.
    out = run(2, "--mode=evaluate", f"--workdir={tmp_path / '4'}", "--config.k=20")
    assert "MAP@20 " in out


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


def test_a_workdir_in_use_is_told_of_by_the_first(tmp_path):
    with claim_workdir(tmp_path / "run"):  # as another process does
        told = finish(start(2, *small.flags(**LONG), f"--workdir={tmp_path / 'run'}"))
    assert [code for code, _, _ in told] == [2, 2], told
    assert told[0][2].count("another process is at work in it") == 1
    assert "Traceback" not in told[0][2] + told[1][2] and "at work" not in told[1][2]


def test_what_one_process_refuses_while_training_ends_the_other_alike(tmp_path):
    """The checkpoints are taken over by somebody else, which the first process alone looks at."""
    place = tmp_path / "checkpoints"
    many.config(tmp_path)  # writes the features
    fields = many.FEATURES | {"data__dir": str(tmp_path / "features.npy"), "train__checkpoint_dir": str(place)}
    fields |= {"epochs": 3000}
    processes = start(2, *small.flags(**fields), f"--workdir={tmp_path / 'run'}")
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
    arguments = killed(tmp_path, victim, LONG, epochs=5, environment=OPTIMIZED)
    # On two processes again, or on one.
    out = run(2 - victim, *arguments, environment=with_devices(1 + victim, OPTIMIZED))
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
