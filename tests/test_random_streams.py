"""Random streams: published numbers stay, and no two purposes of a run share a key."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cib_jax as cib
from cib_jax.augment.augment import two_view_keys
from cib_jax.random_streams import KEY_STREAMS, RNG_STREAMS, fold_by_name, stream_key, stream_rng
from cib_jax.training import input_pipeline
from cib_jax.training.input_pipeline import BatchOrder
from cib_jax.training.train_step import Method


def test_published_streams_keep_their_numbers():
    """Splits, orders and cached features of earlier versions follow from these."""
    for name, number in (("initial weights", 0), ("view bank", 1), ("steps", 2), ("baseline", 3)):
        expected = jax.random.fold_in(jax.random.key(7), number)
        assert jax.random.key_data(stream_key(7, name)).tolist() == jax.random.key_data(expected).tolist()
    for name, number in (("queries", 0), ("training images", 1), ("validation queries", 2), ("scored images", 6)):
        expected = np.random.default_rng((7, number)).random(4)
        assert np.array_equal(stream_rng(7, name).random(4), expected)
    assert np.array_equal(stream_rng(7, "epoch order", 2).random(4), np.random.default_rng((7, 3, 2)).random(4))


def test_every_name_has_a_number_of_its_own():
    for table in (KEY_STREAMS, RNG_STREAMS):
        assert len(set(table.values())) == len(table)


def keys_of_a_run(seed):
    """Yields every key of a short run with a teacher and a bank, with those that they are folds of."""
    yield jax.random.key(seed)
    for weights in ("initial weights", "teacher weights"):
        yield (key := stream_key(seed, weights))
        yield from (fold_by_name(key, part) for part in ("backbone", "head", "lora"))
    for bank in ("view bank", "score views"):
        yield (key := stream_key(seed, bank))
        for view in range(4):
            yield (of_view := jax.random.fold_in(key, view))
            yield from (jax.random.fold_in(of_view, image) for image in range(8))
    for steps in ("steps", "teacher steps"):
        yield (root := stream_key(seed, steps))
        for number in range(16):
            yield (step := jax.random.fold_in(root, number))
            views, bits, pairs = (fold_by_name(step, part) for part in ("views", "code bits", "view pairs"))
            yield from (views, bits, pairs, *jax.random.split(pairs), fold_by_name(step, "head dropout"))
            yield from (jax.random.fold_in(bits, view) for view in (1, 2))
            yield from itertools.chain(*(jax.random.fold_in(views, view)[None] for view in (0, 1)))
            yield from itertools.chain(*two_view_keys(views, 8))
    yield stream_key(seed, "baseline")


def test_no_two_keys_of_a_run_are_equal():
    keys = [tuple(jax.random.key_data(key).tolist()) for seed in (0, 1) for key in keys_of_a_run(seed)]
    assert len(keys) > 1000 and len(set(keys)) == len(keys)


def test_a_teacher_starts_from_other_weights():
    """Once its key was `fold_in(key, 1)`, which is the second half of `split(key)`: the key of the student's head."""
    made = [
        jax.tree.leaves(cib.create_encoder(stream_key(0, name), backbone="convnet", bits=8, image_size=8, hidden=8)[1])
        for name in ("initial weights", "teacher weights")
    ]
    for mine, theirs in zip(*made, strict=True):
        assert not np.array_equal(mine, theirs) or np.unique(mine).size == 1  # biases of 0, scales of 1


@pytest.mark.parametrize("what", ["images", "features", "bank"])
def test_jax_finds_no_key_that_a_step_uses_twice(what):
    """By JAX's own checker of key reuse."""
    features = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0), backbone="none", bits=8, hidden=8, standard=cib.augment.features.standard([features])
    )
    method = {"encoder": encoder, "optimizer": optax.sgd(0.1), "augment": "noise", "head_dropout": 0.5}
    state = cib.create_train_state(params, method["optimizer"])
    with jax.debug_key_reuse(True):
        if what == "images":
            jax.jit(lambda key: cib.train_step(state, frozen, features, key, **method))(jax.random.key(1))
        elif what == "features":
            jax.jit(lambda key: cib.train_step_on_features(state, features, features, key, **method))(jax.random.key(1))
        else:
            bank = jnp.stack([features, features + 1])
            feed = input_pipeline.from_bank(bank, Method(**method), BatchOrder(0, 4))
            feed.steps(state, next(iter(feed.epoch_chunks(0, 0))), 0, jax.random.key(1))


def test_jaxs_checker_finds_a_key_that_is_used_twice():
    with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError):
        jax.jit(lambda key: jax.random.normal(key) + jax.random.uniform(key))(jax.random.key(0))


def test_the_table_does_not_import_jax():
    code = "import sys, cib_jax.random_streams as s; s.stream_rng(0, 'queries'); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
