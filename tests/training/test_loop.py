"""The loop on a step of plain arithmetic: cutting it in two, early stopping, loss that is not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cib_jax.training import loop
from cib_jax.training.loop import Feed, Hooks, Schedule
from cib_jax.training.train_step import Progress, TrainState


def start():
    return TrainState(step=jnp.zeros((), jnp.int32), params={"x": jnp.zeros(3)}, opt_state=())


def steps(state, chunk, first, key):
    """Adds noise of each step's key and its batch's sum; the term is the batch's first entry."""
    x = state.params["x"]
    for offset, batch in enumerate(chunk):
        x = x + jax.random.normal(jax.random.fold_in(key, first + offset), (3,)) + batch.sum()
    return TrainState(state.step + len(chunk), {"x": x}, ()), {"loss": jnp.asarray(chunk[:, 0])}


def chunks(epoch, first):
    """Returns five batches of two numbers, in chunks of two and three."""
    batches = np.array([[epoch, index] for index in range(5)], np.float32)
    return iter([batches[start:stop] for start, stop in ((0, 2), (2, 5)) if start >= first])


def run(state, progress, epochs, *, validate_every=20, patience=6, epoch_chunks=chunks, **hooks):
    schedule = Schedule(epochs, batch_size=2, validate_every=validate_every, patience=patience)
    feed = Feed(steps, epoch_chunks)
    return loop.run(state, progress, feed, key=jax.random.key(0), schedule=schedule, hooks=Hooks(**hooks))


def test_a_run_cut_between_any_two_epochs_ends_with_the_same_bits():
    whole, _ = run(start(), Progress(), 4)
    for cut in range(1, 4):
        state, progress = run(start(), Progress(), cut)
        state, progress = run(state, dataclasses.replace(progress, finished=False), 4)
        assert np.array_equal(state.params["x"], whole.params["x"])
        assert (progress.epoch, progress.step, progress.finished) == (4, 20, True)


def test_a_run_stopped_after_any_chunk_continues_to_the_same_bits_and_means():
    all_terms = []
    whole, _ = run(start(), Progress(), 4, on_epoch=lambda state, report: all_terms.append(report.terms))
    for cut in range(1, 8):
        asked, reports = iter([False] * (cut - 1) + [True]), []
        state, progress = run(
            start(),
            Progress(),
            4,
            stop=lambda asked=asked: next(asked),
            on_epoch=lambda state, report, reports=reports: reports.append(report.terms),
        )
        assert progress.step == (cut // 2) * 5 + (cut % 2) * 2 and not progress.finished
        # An epoch that was stopped at its very end is still to be reported.
        assert (progress.epoch, progress.steps_of_epoch) == ((cut - 1) // 2, (5, 2)[cut % 2])
        state, progress = run(
            state, progress, 4, on_epoch=lambda state, report, reports=reports: reports.append(report.terms)
        )
        assert np.array_equal(state.params["x"], whole.params["x"])
        assert reports == all_terms
        assert (progress.epoch, progress.step, progress.steps_of_epoch, progress.sums) == (4, 20, 0, {})


def test_a_step_is_keyed_by_the_root_key_folded_with_its_number():
    state, _ = run(start(), Progress(), 2)
    expected = np.zeros(3, np.float32)
    for number in range(10):
        expected += jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (3,))
    expected += sum(epoch + index for epoch in range(2) for index in range(5))
    np.testing.assert_allclose(state.params["x"], expected, rtol=1e-5)


def test_an_epochs_report_holds_the_mean_of_its_terms():
    reports = []
    run(
        start(),
        Progress(),
        2,
        epoch_chunks=lambda epoch, first: (np.array([[epoch * 100 + i]], np.float32) for i in range(70)),
        on_epoch=lambda state, report: reports.append(report),
    )
    assert [report.terms["loss"] for report in reports] == [34.5, 134.5]
    assert [report.progress.step for report in reports] == [70, 140]


def validated(scores, epochs=10, **options):
    given, reports = iter(scores), []
    _, progress = run(
        start(),
        Progress(),
        epochs,
        validate=lambda state: next(given),
        on_epoch=lambda state, report: reports.append(report),
        **options,
    )
    return progress, reports


def test_training_stops_after_so_many_validations_without_a_better_one():
    progress, reports = validated([0.1, 0.3, 0.2, 0.3, 0.25], validate_every=1, patience=3)
    assert (progress.best_score, progress.best_step, progress.epoch, progress.finished) == (0.3, 10, 5, True)
    assert [report.score for report in reports] == [0.1, 0.3, 0.2, 0.3, 0.25]


def test_a_better_validation_starts_the_count_again():
    progress, _ = validated([0.3, 0.2, 0.2, 0.4, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1], validate_every=1, patience=3)
    assert (progress.best_score, progress.epoch) == (0.5, 10)


def test_validations_come_every_n_epochs_and_at_the_end():
    progress, reports = validated([0.1, 0.2, 0.3], epochs=7, validate_every=3)
    assert [r.progress.epoch for r in reports if r.score is not None] == [3, 6, 7]
    assert progress.best_step == 35


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(bad):
    def poisoned(epoch, first):
        losses = np.array([[bad if (epoch, i) == (1, 2) else 1.5] for i in range(5)], np.float32)
        return iter((losses[:1], losses[1:]))

    ended = []
    with pytest.raises(loop.NonFiniteLossError, match=r"step 8: .*loss (nan|inf)"):
        run(start(), Progress(), 3, epoch_chunks=poisoned, on_epoch=lambda s, report: ended.append(report))
    assert [report.progress.epoch for report in ended] == [1]


@pytest.mark.parametrize("bad", [1, 20, 40, 57, 90])
def test_a_loss_that_is_not_finite_in_any_portion_is_named_by_its_step(bad):
    """Terms of an epoch are fetched in portions of chunks."""

    def poisoned(epoch, first):
        return (np.array([[np.nan if index + 1 == bad else 0.0]], np.float32) for index in range(90))

    with pytest.raises(loop.NonFiniteLossError, match=f"step {bad}:"):
        run(start(), Progress(), 1, epoch_chunks=poisoned)


def test_hooks_see_every_step_once_and_a_device_that_is_never_waited_for_long():
    """Terms are fetched in portions; together they are all steps."""
    counts = []
    _, progress = run(
        start(),
        Progress(),
        1,
        epoch_chunks=lambda epoch, first: (np.array([[index]], np.float32) for index in range(100)),
        on_steps=lambda steps, terms: counts.append((steps, terms["loss"])),
    )
    steps_done = np.cumsum([steps for steps, _ in counts])
    assert steps_done[-1] == progress.step == 100 and len(counts) > 2
    assert [loss for _, loss in counts] == (steps_done - 1).tolist()  # the last step of each portion
