"""A batch in parts against the whole batch: a loss and gradient written out in NumPy, and the plain step."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cib_jax as cib
from cib_jax import errors
from cib_jax.augment.features import standard
from cib_jax.commands.train import train
from cib_jax.config import schema
from cib_jax.errors import ConfigError
from tests import small

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
KEY = jax.random.key(5)
TEMPERATURE, BETA = 0.4, 0.2


@pytest.fixture(scope="module")
def made():
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0), backbone="convnet", bits=16, image_size=8, hidden=16
    )
    # Its first trace is the gradient itself, not what the gradient did to large parameters.
    return encoder, params, frozen, optax.sgd(0.1, momentum=0.9)


@pytest.fixture(scope="module")
def whole(made):
    """Logits of the whole batch at once, and the way back from their gradient to the parameters'."""
    encoder, params, frozen, _ = made
    view_key, _ = jax.random.split(KEY)

    def logits(params):
        views = encoder.two_views(view_key, jnp.asarray(IMAGES), family="digits")
        return encoder.logits(params, frozen, jnp.concatenate(views))

    return np.asarray(jax.jit(logits)(params)), jax.jit(lambda gradient: jax.vjp(logits, params)[1](gradient)[0])


def nt_xent(codes):
    """Returns NT-Xent and its gradient, in float64, from the softmax over all other codes."""
    count = len(codes)
    length = np.linalg.norm(codes, axis=1, keepdims=True)
    unit = codes / length
    similarity = unit @ unit.T / TEMPERATURE
    np.fill_diagonal(similarity, -np.inf)
    positive = np.roll(np.eye(count), count // 2, axis=1)
    chances = np.exp(similarity)
    chances /= chances.sum(1, keepdims=True)
    value = -np.log(chances[positive > 0]).mean()
    of_similarity = (chances - positive) / count
    of_unit = (of_similarity + of_similarity.T) @ unit / TEMPERATURE
    return value, (of_unit - unit * (unit * of_unit).sum(1, keepdims=True)) / length


def expected(logits, objective, stochastic):
    """Returns the terms of the loss, and the gradient of each logit."""
    logits = logits.astype(np.float64)
    p = 1 / (1 + np.exp(-logits))
    if objective == "naive_cl":
        contrast, gradient = nt_xent(logits)
    else:
        _, code_key = jax.random.split(KEY)
        shape = (len(IMAGES), logits.shape[1])
        drawn = [jax.random.uniform(jax.random.fold_in(code_key, view), shape) for view in (1, 2)]
        on = np.concatenate(drawn) < p if stochastic else logits > 0
        contrast, gradient = nt_xent(np.where(on, 1.0, -1.0))
        gradient = gradient * p * (1 - p)  # straight through: ∂b/∂p = 1
    other = np.roll(logits, len(IMAGES), axis=0)
    off = 1 - p
    q = 1 / (1 + np.exp(-other))
    kl = (p * np.log(p / q) + off * np.log(off / (1 - q))).sum(1).mean()
    loss = contrast
    if objective == "cibhash":
        loss = contrast + BETA * kl
        gradient = gradient + BETA * 0.5 * p * off * (logits - other) / len(IMAGES)
    return {"loss": loss, "contrast": contrast, "kl": kl}, gradient


@pytest.mark.parametrize(
    ("objective", "stochastic", "micro_batch"),
    [
        ("cibhash", True, 1),
        ("cibhash", False, 3),
        ("cl_hash", True, 6),
        ("naive_cl", True, 4),
    ],
)
def test_a_step_in_parts_has_the_loss_and_gradient_of_the_whole_batch(made, whole, objective, stochastic, micro_batch):
    encoder, params, frozen, optimizer = made
    logits, pull_back = whole
    terms, of_logits = expected(logits, objective, stochastic)
    step = functools.partial(
        cib.train_step,
        encoder=encoder,
        optimizer=optimizer,
        objective=objective,
        temperature=TEMPERATURE,
        beta=BETA,
        stochastic=stochastic,
        augment="digits",
        micro_batch=micro_batch,
    )
    after, told = jax.jit(step)(cib.create_train_state(params, optimizer), frozen, IMAGES, KEY)
    for name, value in terms.items():
        np.testing.assert_allclose(told[name], value, rtol=1e-5)
    theirs = pull_back(jnp.float32(of_logits))
    for a, b in zip(*map(jax.tree.leaves, (after.opt_state[0].trace, theirs)), strict=True):
        # A bias before a standardisation has no gradient but rounding.
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-6
    norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(theirs)))
    np.testing.assert_allclose(told["gradient_norm"], norm, rtol=1e-4)


def test_a_frozen_backbone_in_parts_takes_one_pass_and_the_plain_step(made):
    """Its program goes through the network in one loop where a trained backbone needs two."""
    encoder, params, _, optimizer = made
    frozen, head = {"backbone": params["backbone"]}, {"head": params["head"]}
    state = cib.create_train_state(head, optimizer)

    def step(micro_batch):
        options = {"encoder": encoder, "optimizer": optimizer, "augment": "digits", "beta": 0.1}
        return jax.jit(functools.partial(cib.train_step, micro_batch=micro_batch, **options))

    (after, terms), (plain, plain_terms) = (step(size)(state, frozen, IMAGES, KEY) for size in (4, 0))
    assert jax.tree.map(float, terms) == pytest.approx(jax.tree.map(float, plain_terms), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (after.opt_state, plain.opt_state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)

    def convolutions(params, frozen):
        jaxpr = str(step(4).trace(cib.create_train_state(params, optimizer), frozen, IMAGES, KEY).jaxpr)
        return jaxpr.count("= conv_general_dilated[")

    assert 0 < convolutions(head, frozen) < convolutions(params, {}) / 2


def test_one_part_is_the_plain_step(made):
    encoder, params, frozen, optimizer = made
    state = cib.create_train_state(params, optimizer)
    options = {"encoder": encoder, "optimizer": optimizer, "augment": "digits"}
    lowered = [
        jax.jit(functools.partial(cib.train_step, micro_batch=size, **options)).lower(state, frozen, IMAGES, KEY)
        for size in (len(IMAGES), 0)
    ]
    assert lowered[0].as_text() == lowered[1].as_text()


def test_memory_is_that_of_a_part():
    """Of the compiled programs: without the second pass, what each layer made of the whole batch is kept."""
    encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
    optimizer = optax.sgd(0.1)
    images = jnp.zeros((64, 16, 16, 3), jnp.uint8)

    def bytes_of(micro_batch):
        options = {"encoder": encoder, "optimizer": optimizer, "augment": "digits", "micro_batch": micro_batch}
        step = functools.partial(cib.train_step, **options)
        lowered = jax.jit(step).lower(cib.create_train_state(params, optimizer), frozen, images, KEY)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # A sixteenth of the activations, and the sums of gradients, which do not shrink.
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert bytes_of(4) < bytes_of(0) / 8 + 2 * gradients


# One process with 4 devices, since their number is fixed when JAX starts.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
import cib_jax as cib
from cib_jax.distributed import sharding
from cib_jax.training import feed, state

key = jax.random.key(0)
images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8))
encoder, params, frozen = cib.create_encoder(key, backbone="convnet", bits=8, image_size=8, hidden=16)
optimizer = optax.sgd(0.1, momentum=0.9)
told = {}
for devices, micro_batch in ((1, 0), (4, 2)):
    method = {"encoder": encoder, "optimizer": optimizer, "augment": "digits", "micro_batch": micro_batch}
    fed = feed.from_device(images, frozen, seed=0, batch_size=16, method=method, mesh=parallel.mesh(devices, 16))
    (batch,) = fed.epoch_chunks(0)
    after, terms = fed.steps(state.create_train_state(params, optimizer), batch, 0, key)
    gradient = [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(after.opt_state)]
    told[f"{devices} {micro_batch}"] = {name: float(value[0]) for name, value in terms.items()}, gradient
json.dump(told, open(sys.argv[1], "w"))
"""


def test_parts_on_several_devices_are_still_one_batch(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    path = tmp_path / "told.json"
    subprocess.run([sys.executable, "-c", PROGRAM, str(path)], cwd=ROOT, env=environment, check=True)
    told = json.loads(path.read_text())
    terms, gradient = told.pop("1 0")
    assert terms["gradient_norm"] > 1e-3
    for other_terms, other in told.values():
        assert other_terms == pytest.approx(terms, rel=1e-5)
        for mine, theirs in zip(other, gradient, strict=True):
            assert np.linalg.norm(np.subtract(mine, theirs)) <= 1e-4 * np.linalg.norm(theirs) + 1e-6


def test_fit_in_parts_learns_the_same_losses():
    def losses(micro_batch):
        told = []
        cib.fit(
            IMAGES,
            bits=8,
            image_size=8,
            hidden=16,
            augment="digits",
            epochs=2,
            batch_size=6,
            learning_rate=1e-4,
            micro_batch=micro_batch,
            on_epoch=lambda report: told.append(report.terms["loss"]),
        )
        return told

    assert losses(2) == pytest.approx(losses(0), rel=1e-4)


@pytest.mark.parametrize("micro_batch", [4, 12, -2])
def test_a_size_that_does_not_divide_is_refused(made, tmp_path, micro_batch):
    encoder, params, frozen, optimizer = made
    message = rf"config.micro_batch: {micro_batch} does not divide the 6 images .* choose a divisor of 6, or 0"
    with pytest.raises(errors.ConfigError, match=message):
        cib.fit(IMAGES, batch_size=6, micro_batch=micro_batch)
    state = cib.create_train_state(params, optimizer)
    with pytest.raises(errors.ConfigError, match=message):
        cib.train_step(state, frozen, IMAGES[:6], KEY, encoder=encoder, optimizer=optimizer, micro_batch=micro_batch)


def test_a_job_refuses_a_size_that_does_not_divide_before_it_claims_anything(tmp_path):
    with pytest.raises(errors.ConfigError, match=r"config.micro_batch: 5 does not divide the 32 images"):
        train(small.config(micro_batch=5), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_features_have_no_parts():
    features = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    with pytest.raises(ValueError, match=r"micro_batch: 2 images at a time save nothing where features train"):
        cib.fit(features, backbone="none", augment="noise", batch_size=6, micro_batch=2)
    with pytest.raises(ValueError, match=r"micro_batch: 2 images at a time save nothing where features train"):
        cib.fit(IMAGES, views=2, batch_size=6, micro_batch=2)
    encoder, params, frozen = cib.create_encoder(KEY, backbone="none", bits=8, standard=standard([features]))
    state = cib.create_train_state(params, optax.sgd(0.1))
    with pytest.raises(errors.ConfigError, match=r"config.micro_batch: only images go .* set it to 0"):
        cib.train_step(
            state, frozen, features, KEY, encoder=encoder, optimizer=optax.sgd(0.1), augment="noise", micro_batch=2
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"micro_batch": -1}, r"config.micro_batch: -1 must be 0 or more"),
        (
            {"micro_batch": 8, "train__views": 2, "backbone": "efficientnet_lite0", "frozen": True, "image_size": 32},
            r"config.micro_batch: features of config.train.views go through no backbone",
        ),
        (
            {
                "micro_batch": 8,
                "data__name": "features",
                "backbone": "none",
                "augment": "noise",
                "frozen": True,
                "image_size": 0,
            },
            r"config.micro_batch: it is for images; set it to 0 for features",
        ),
    ],
)
def test_a_config_in_which_parts_have_no_sense_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        schema.validate(small.unchecked(**fields))
