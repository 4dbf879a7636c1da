"""Checkpoints: what goes in comes out, the last two and the best are kept, damage is named."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cib_jax.training.checkpoint import CheckpointError, Checkpoints, Progress
from cib_jax.training.state import create_train_state

OPTIMISER = optax.adam(1e-3)


def state_of(value, width=4):
    params = {"head": {"kernel": jnp.full((3, width), value)}, "backbone": {"layers": {0: jnp.full(2, value)}}}
    state = create_train_state(params, OPTIMISER)
    return dataclasses.replace(state, step=jnp.asarray(int(value), jnp.int32))


def saved(directory, steps, best=0):
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step), Progress(epoch=step, step=step, best_step=best), {"note": "n"})


def test_a_state_comes_back_bit_by_bit(tmp_path):
    progress = Progress(epoch=3, step=7, best_step=2, best_map=0.25, bad_validations=1, finished=True, seconds=1.5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(7.0), progress, {"config": {"bits": 32}})
    with Checkpoints(tmp_path) as checkpoints:
        state, restored, extra = checkpoints.restore(state_of(0.0))
    assert jax.tree.structure(state) == jax.tree.structure(state_of(0.0))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state, state_of(7.0))), strict=True))
    assert restored == progress
    assert extra == {"config": {"bits": 32}}


def test_a_save_holds_the_state_of_its_moment(tmp_path):
    """The next step donates the buffers at once, while they are still being written."""
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = state_of(1.0, width=200_000)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(state, Progress(step=step), {})
            state = advance(state)
    with Checkpoints(tmp_path) as checkpoints:
        restored, _, _ = checkpoints.restore(state_of(0.0, width=200_000), 3)
    assert np.unique(restored.params["head"]["kernel"]).tolist() == [3.0]


def test_the_last_two_and_the_best_are_kept(tmp_path):
    saved(tmp_path, range(1, 8), best=3)
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [3, 6, 7]


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    saved(tmp_path, [1, 2])
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 2


def test_an_empty_folder_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="there is no checkpoint here"):
        checkpoints.restore(state_of(0.0))


def test_a_damaged_checkpoint_is_named(tmp_path):
    saved(tmp_path, [5])
    for file in pathlib.Path(tmp_path / "5" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"/5: the checkpoint cannot be read"),
    ):
        checkpoints.restore(state_of(0.0))


def test_another_networks_checkpoint_is_refused(tmp_path):
    saved(tmp_path, [5])
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"/5: the checkpoint cannot be read"),
    ):
        checkpoints.restore(state_of(0.0, width=9))
