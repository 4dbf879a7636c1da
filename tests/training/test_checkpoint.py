"""Checkpoints: what goes in comes out, the last two and the best are kept, damage is named."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cib_jax.errors import CheckpointError, OtherNetworkError
from cib_jax.training.checkpoint import Checkpoints
from cib_jax.training.train_step import Progress, create_train_state

OPTIMIZER = optax.adam(1e-3)


def state_of(value, width=4):
    params = {"head": {"kernel": jnp.full((3, width), value)}, "backbone": {"layers": {0: jnp.full(2, value)}}}
    state = create_train_state(params, OPTIMIZER)
    return dataclasses.replace(state, step=jnp.asarray(int(value), jnp.int32))


def saved(directory, steps, best=0):
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(float(step)), Progress(epoch=step, step=step, best_step=best), {"note": "n"})


def test_a_state_comes_back_bit_by_bit(tmp_path):
    progress = Progress(epoch=3, step=7, best_step=2, best_score=0.25, bad_validations=1, finished=True, seconds=1.5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(7.0), progress, {"config": {"bits": 32}})
    with Checkpoints(tmp_path) as checkpoints:
        state, restored, extra = checkpoints.restore(state_of(0.0))
    assert jax.tree.structure(state) == jax.tree.structure(state_of(0.0))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state, state_of(7.0))), strict=True))
    assert restored == progress
    assert extra == {"config": {"bits": 32}}


EIGHT = {"shape": [8], "axis_names": ["data"], "axis_types": ["AxisType.Auto"], "partition_spec": []}
EIGHT |= {"sharding_type": "NamedSharding", "device_mesh": {"mesh": [{"id": number} for number in range(8)]}}


@pytest.mark.parametrize(
    "sharding",
    [
        {"sharding_type": "SingleDeviceSharding", "device_str": "TPU_0(process=0,(0,0,0,0))"},
        {"sharding_type": "SingleDeviceSharding", "device_str": "cuda:0"},
        EIGHT,
    ],
    ids=["a TPU", "a GPU", "eight devices"],
)
def test_a_checkpoint_of_devices_that_are_not_here_is_restored(tmp_path, sharding):
    """Orbax notes beside the arrays where they were; the names here are those of TPUs and GPUs."""
    saved(tmp_path, [1])
    file = tmp_path / "1" / "state" / "_sharding"
    arrays = json.loads(file.read_text())
    assert arrays
    file.write_text(json.dumps(dict.fromkeys(arrays, json.dumps(sharding))))
    with Checkpoints(tmp_path) as checkpoints:
        state, _, _ = checkpoints.restore(state_of(0.0))
    for there, here in zip(*map(jax.tree.leaves, (state_of(1.0), state)), strict=True):
        np.testing.assert_array_equal(there, here)
        assert here.devices() == {jax.devices()[0]}


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


def test_without_a_validation_the_untrained_one_goes_like_any_other(tmp_path):
    saved(tmp_path, range(0, 4))
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [2, 3]


def test_a_step_that_is_saved_again_takes_the_place_of_the_first(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(1.0), Progress(step=1, steps_of_epoch=1, sums={"loss": 0.5}), {})
        checkpoints.save(state_of(1.0), Progress(step=1, epoch=1), {})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state_of(0.0))[1] == Progress(step=1, epoch=1)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    saved(tmp_path, [1, 2])
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 2


def test_an_empty_folder_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as refused:
        checkpoints.restore(state_of(0.0))
    assert refused.value.field == str(tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    saved(tmp_path, [5])
    for file in pathlib.Path(tmp_path / "5" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as refused:
        checkpoints.restore(state_of(0.0))
    assert refused.value.field == str(tmp_path / "5")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def files_of(folder):
    return sorted(file for file in pathlib.Path(folder).rglob("*") if file.is_file() and file.stat().st_size)


def test_a_flipped_bit_or_a_missing_file_anywhere_is_seen_or_harmless(tmp_path):
    """Whatever file is hit, a checkpoint gives its own state or none; where none, the one before is taken."""
    saved(tmp_path / "whole", [1, 2])
    seen = 0
    for number, file in enumerate(files_of(tmp_path / "whole" / "2")):
        for how in (flip, pathlib.Path.unlink):
            copy = tmp_path / f"{number}-{how.__name__}"
            shutil.copytree(tmp_path / "whole", copy / "checkpoints")
            how(copy / "checkpoints" / file.relative_to(tmp_path / "whole"))
            warnings = []
            with Checkpoints(copy / "checkpoints") as checkpoints:
                state, progress, extra = checkpoints.restore_newest(state_of(0.0), warnings.append)
            expected = state_of(2.0 if not warnings else 1.0)
            assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state, expected)), strict=True))
            assert progress.step == (2 if not warnings else 1) and extra == {"note": "n"}
            if warnings:
                seen += 1
                assert f"{copy / 'checkpoints' / '2'}: " in warnings[0] and "step 1" in warnings[0]
                assert (copy / "checkpoints" / "damaged-2").is_dir() and not (copy / "checkpoints" / "2").exists()
    assert seen > 2


def test_training_goes_on_over_a_damaged_checkpoint_of_the_same_step(tmp_path):
    saved(tmp_path / "checkpoints", [1, 2])
    for file in files_of(tmp_path / "checkpoints" / "2" / "state"):
        flip(file)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.restore_newest(state_of(0.0))
        checkpoints.save(state_of(2.0), Progress(epoch=2, step=2), {})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert int(checkpoints.restore(state_of(0.0))[0].step) == 2


@pytest.mark.parametrize(
    ("other", "shapes"),
    [
        (lambda: state_of(0.0, width=9), r"head\.kernel: \(3, 4\) there, \(3, 9\) here"),
        (lambda: dataclasses.replace(state_of(0.0), params={"tail": jnp.ones(2)}), "there, absent here"),
    ],
)
def test_another_networks_checkpoint_is_refused_and_stays_where_it_is(tmp_path, other, shapes):
    """Once it was taken for damaged and renamed."""
    saved(tmp_path, [4, 5])
    before = sorted(path.name for path in tmp_path.iterdir())
    with Checkpoints(tmp_path) as checkpoints:
        for restore in (checkpoints.restore, checkpoints.restore_newest):
            with pytest.raises(OtherNetworkError, match=shapes) as refused:
                restore(other())
            assert refused.value.field == str(tmp_path / "5")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def edit(directory, part, change):
    """Edits a JSON part of the only checkpoint."""
    (file,) = [file for file in files_of(directory) if file.parent.name == part and file.name == "metadata"]
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("progress", lambda content: content.update(step=6)),
        ("progress", lambda content: content.update(epoch=4)),
        ("progress", lambda content: content.update(seconds=1.0)),
        ("extra", lambda content: content.update(note="m")),
        ("extra", lambda content: content.pop("checksum")),
        ("progress", lambda content: content.pop("step")),
        ("progress", lambda content: content.update(other=1)),
        ("progress", lambda content: content.update(step="5")),
        ("progress", lambda content: content.update(sums=[])),
        ("extra", lambda content: content.clear()),
    ],
)
def test_edited_metadata_are_noticed(tmp_path, part, change):
    saved(tmp_path, [5])
    edit(tmp_path, part, change)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as refused:
        checkpoints.restore(state_of(0.0))
    assert refused.value.field == str(tmp_path / "5")


def test_a_checkpoint_without_a_checksum_of_its_metadata_is_read(tmp_path):
    """One of version 0.1.0, which covered the state alone."""
    progress = Progress(epoch=1, step=5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(5.0), progress, {})
    digest = hashlib.blake2b(digest_size=16)
    state = {field.name: getattr(state_of(5.0), field.name) for field in dataclasses.fields(state_of(5.0))}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
    edit(tmp_path, "extra", lambda content: content.update(checksum=digest.hexdigest()))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state_of(0.0))[1:] == (progress, {})


def test_deep_json_and_pipes_in_a_checkpoint_are_refused(tmp_path):
    saved(tmp_path / "whole", [5])
    for name, damage in (
        ("deep", lambda file: file.write_text("[" * 100_000)),
        ("list", lambda file: file.write_text("[1, 2]")),
        ("pipe", lambda file: (file.unlink(), os.mkfifo(file))),
    ):
        for part in ("progress", "extra"):
            directory = tmp_path / name / part
            shutil.copytree(tmp_path / "whole", directory)
            damage(directory / "5" / part / "metadata")
            with Checkpoints(directory) as checkpoints, pytest.raises(CheckpointError) as refused:
                checkpoints.restore(state_of(0.0))
            assert refused.value.field == str(directory / "5")


@pytest.mark.parametrize(
    "change",
    [
        {"item_handlers": 3},
        {"metrics": "x"},
        {"init_timestamp_nsecs": {}},
        {"commit_timestamp_nsecs": 10**30},
        {"custom_metadata": 10**30},
    ],
)
@pytest.mark.parametrize("read_only", [True, False])
def test_crafted_metadata_of_orbax_are_one_error(tmp_path, change, read_only):
    saved(tmp_path, [1])
    file = tmp_path / "1" / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match="_CHECKPOINT_METADATA") as refused:
        Checkpoints(tmp_path, read_only=read_only)
    assert refused.value.field == str(tmp_path) and "\n" not in str(refused.value)
