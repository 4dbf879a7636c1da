"""The trainer: the feed that suits the data, a teacher first, and the files that run before the first loss."""

import contextlib
import dataclasses
import gc
import io
import pathlib
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console

import cib_jax as cib
from cib_jax import errors
from cib_jax.augment.features import standard
from cib_jax.commands.train import train as train_in_workdir
from cib_jax.data import dataset
from cib_jax.training import train_step, trainer
from cib_jax.training.loop import Hooks, Schedule
from cib_jax.training.train_step import Method, Progress
from cib_jax.training.trainer import TrainingData, TrainingRun
from configs import cifar
from tests.data import miniature

FEATURES = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def run():
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0), backbone="none", bits=8, hidden=8, standard=standard([FEATURES])
    )
    method = Method(encoder, optax.sgd(0.1), augment="noise")
    return TrainingRun(method, params, frozen, TrainingData(jnp.asarray(FEATURES)), Schedule(2, 8), jax.random.key(1))


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]


def assert_same(one, other):
    assert all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


def test_a_session_continues_where_another_one_stopped(run):
    whole, progress = trainer.train(run)
    assert (progress.step, progress.epoch, progress.finished) == (6, 2, True)
    stops = iter([True])
    state, progress = trainer.train(run, hooks=Hooks(stop=lambda: next(stops)))
    assert not progress.finished and progress.steps_of_epoch == 3  # features: an epoch is one program
    state, progress = trainer.train(run, (state, progress))
    assert progress.finished
    assert_same(state, whole)


def test_streamed_and_resident_features_end_with_the_same_parameters(run):
    resident, _ = trainer.train(run)
    streamed, _ = trainer.train(dataclasses.replace(run, data=TrainingData(FEATURES)))
    for mine, theirs in zip(leaves(streamed), leaves(resident), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_a_bank_is_what_steps_take_if_there_is_one(run):
    """A bank of two equal views: every step is one on known features, whatever the images are."""
    bank = jnp.asarray(np.stack([FEATURES, FEATURES]), jnp.float16)
    terms = []
    hooks = Hooks(on_steps=lambda steps, last: terms.append(last))
    trainer.train(dataclasses.replace(run, data=TrainingData(np.zeros(0), bank)), hooks=hooks)
    assert all(last["kl"] == 0 for last in terms)  # both views have the same logits


def test_the_images_left_over_make_a_smaller_batch_if_asked(run):
    """24 items in batches of 7: a loop over their order by hand, with 3 whole batches and one of 3 items an epoch."""
    schedule = Schedule(2, 7, partial_batch=True)
    assert schedule.steps_per_epoch(24) == 4 and Schedule(2, 7).steps_per_epoch(24) == 3
    end, progress = trainer.train(dataclasses.replace(run, schedule=schedule))
    assert progress.step == 8
    state = cib.create_train_state(run.params, run.method.optimizer)
    step = jax.jit(lambda state, rows, key: train_step.update(state, {}, train_step.Batch(rows), key, run.method)[0])
    for epoch in range(2):
        order = dataset.epoch_order(run.data.seed, epoch, 24)
        for rows in (order[:7], order[7:14], order[14:21], order[21:]):
            state = step(state, jnp.asarray(FEATURES[rows]), jax.random.fold_in(run.key, int(state.step)))
    for mine, theirs in zip(leaves(end), leaves(state), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    for stop_after in (1, 2):  # before the smaller batch, and after it
        chunks = iter(range(1, 10))
        stopped = trainer.train(
            dataclasses.replace(run, schedule=schedule),
            hooks=Hooks(stop=lambda: next(chunks) == stop_after),  # noqa: B023
        )
        assert stopped[1].steps_of_epoch == 2 + stop_after
        again, _ = trainer.train(dataclasses.replace(run, schedule=schedule), stopped)
        assert_same(again, end)
    streamed, _ = trainer.train(dataclasses.replace(run, schedule=schedule, data=TrainingData(FEATURES)))
    for mine, theirs in zip(leaves(streamed), leaves(end), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "devices", "micro_batch", "fits"),
    [(64, 8, 0, True), (65, 1, 0, False), (66, 1, 0, True), (68, 8, 0, False), (72, 8, 0, True), (76, 2, 4, False)],
)
def test_images_left_over_that_cannot_be_shared_are_refused(images, devices, micro_batch, fits):
    Schedule(1, 64).validate(images, devices, micro_batch)
    with contextlib.nullcontext() if fits else pytest.raises(errors.ConfigError) as refused:
        Schedule(1, 64, partial_batch=True).validate(images, devices, micro_batch)
    assert fits or refused.value.field == "partial_batch"


def test_small_images_stay_on_the_device_and_large_ones_do_not():
    images = np.zeros((4, 8, 8, 3), np.uint8)
    assert isinstance(trainer.load_if_small(images, 0, images.nbytes), jax.Array)
    assert trainer.load_if_small(images, 0, images.nbytes - 1) is images
    assert trainer.load_if_small(images, 4, 4 * 4 * 4 * 3).shape == (4, 4, 4, 3)


def test_a_teacher_comes_first_if_the_objective_needs_one(run):
    calls = []

    def learn_coordinates():
        calls.append("teacher")
        return np.eye(24, dtype=np.float32)

    hooks = Hooks(on_epoch=lambda state, report: calls.append("epoch"))
    taught = dataclasses.replace(run, method=dataclasses.replace(run.method, objective="diffusion"))
    with pytest.raises(ValueError, match="learn_coordinates"):
        trainer.train(taught)
    state, _ = trainer.train(taught, hooks=hooks, learn_coordinates=learn_coordinates)
    assert calls == ["teacher", "epoch", "epoch"]
    other, _ = trainer.train(run, hooks=hooks, learn_coordinates=learn_coordinates)
    assert calls == ["teacher"] + ["epoch"] * 4
    assert not np.array_equal(leaves(state)[0], leaves(other)[0])


def test_the_steps_run_inside_their_context_and_the_teacher_outside(run):
    calls = []

    class Context:
        def __enter__(self):
            calls.append("enter")

        def __exit__(self, *exception):
            calls.append("exit")

    def learn_coordinates():
        calls.append("teacher")
        return np.eye(24, dtype=np.float32)

    taught = dataclasses.replace(run, method=dataclasses.replace(run.method, objective="diffusion"))
    hooks = Hooks(on_epoch=lambda state, report: calls.append("epoch"), during_steps=Context)
    trainer.train(taught, hooks=hooks, learn_coordinates=learn_coordinates)
    assert calls == ["teacher", "enter", "epoch", "epoch", "exit"]


def test_a_finished_run_is_returned_as_it_is(run):
    start = trainer.train(run)
    state, progress = trainer.train(run, start)
    assert state is start[0] and progress == start[1] and isinstance(progress, Progress)


MOST_FILES = 35
PACKAGE = f"{pathlib.Path(cib.__file__).parent}/"


class FirstLoss(BaseException):
    """Ends a run at its first loss."""


def test_few_files_run_before_the_first_loss_of_cifar(tmp_path):
    """Files of the package in which a function runs, without the initializers of folders."""
    config = cifar.get_config()
    config.update_from_flattened_dict(
        {
            "data.dir": str(miniature.prepare(tmp_path / "data")),
            "data.protocol": "own",
            "data.train_images": 32,
            "data.train_per_class": 0,
            "data.validation": "none",
            "image_size": 32,
            "train.views": 2,
            "batch_size": 16,
            "hidden": 16,
            "k": 10,
            "cache.dir": str(tmp_path / "cache"),
        }
    )
    codes = set()

    def record(frame, event, _):
        code = frame.f_code
        if code not in codes:
            codes.add(code)
            if code.co_name == "on_steps" and code.co_filename.startswith(PACKAGE):  # the hook that is given the loss
                raise FirstLoss

    gc.disable()  # objects of earlier tests would otherwise be closed in between, by functions of other files
    before = sys.gettrace()
    threading.settrace(record)
    sys.settrace(record)
    try:
        with pytest.raises(FirstLoss):
            train_in_workdir(config, tmp_path / "run", console=rich.console.Console(file=io.StringIO()))
    finally:
        sys.settrace(before)
        threading.settrace(before)
        gc.enable()
    files = {
        code.co_filename.removeprefix(PACKAGE)
        for code in codes
        if code.co_filename.startswith(PACKAGE) and code.co_name != "<module>"
    }
    files = {name for name in files if not name.endswith("__init__.py")}
    assert {"commands/train.py", "training/trainer.py", "training/train_step.py", "losses.py"} <= files
    assert len(files) <= MOST_FILES, sorted(files)
