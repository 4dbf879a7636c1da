"""A batch in parts against the whole batch: a loss and gradient written out in NumPy, and the plain step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cib_jax as cib
from cib_jax.augment.features import standard
from cib_jax.commands.train import train
from cib_jax.errors import ConfigError
from cib_jax.random_streams import fold_by_name
from tests import small

IMAGES = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 3), dtype=np.uint8)
KEY = jax.random.key(5)
# Views without black borders, where all inputs of a max pool are equal, and rounding decides which has the gradient.
FAMILY = "photo"
TEMPERATURE, BETA = 0.4, 0.2


@pytest.fixture(scope="module")
def made():
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0), backbone="convnet", bits=16, image_size=8, hidden=16
    )
    # The trace of its first step is the gradient itself.
    return encoder, params, frozen, optax.sgd(0.1, momentum=0.9)


@pytest.fixture(scope="module")
def whole(made):
    """A program of the whole batch: from a gradient of its logits to the logits and the parameters' gradient."""
    encoder, params, frozen, _ = made
    view_key = fold_by_name(KEY, "views")

    def logits(params):
        views = encoder.two_views(view_key, jnp.asarray(IMAGES), family=FAMILY)
        return encoder.logits(params, frozen, jnp.concatenate(views))

    def both(gradient):
        value, pull_back = jax.vjp(logits, params)
        return value, pull_back(gradient)[0]

    return jax.jit(both).lower(jax.ShapeDtypeStruct((2 * len(IMAGES), encoder.bits), jnp.float32)).compile()


def expected_step(whole, encoder, objective):
    """Returns the terms of the loss of the whole batch, and the gradient of its parameters."""
    logits, _ = whole(jnp.zeros((2 * len(IMAGES), encoder.bits)))
    terms, of_logits = expected(np.asarray(logits), objective, True)
    return terms, whole(jnp.float32(of_logits))[1]


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
        code_key = fold_by_name(KEY, "code bits")
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


def traced_step(encoder, optimizer, params, frozen, **method):
    """Returns a traced step; once compiled, it also knows the memory that it takes."""
    step = functools.partial(cib.train_step, encoder=encoder, optimizer=optimizer, augment=FAMILY, **method)
    return jax.jit(step).trace(cib.create_train_state(params, optimizer), frozen, IMAGES, KEY)


@pytest.fixture(scope="module")
def in_parts(made):
    """A compiled step of CIBHash in parts of four images."""
    encoder, params, frozen, optimizer = made
    method = {"temperature": TEMPERATURE, "beta": BETA, "micro_batch": 4}
    return traced_step(encoder, optimizer, params, frozen, **method).lower().compile()


def assert_first_step(outcome, terms, gradient):
    """Checks the terms of a first step of momentum, and the gradient in its trace."""
    after, step_terms = outcome
    for name, value in terms.items():
        np.testing.assert_allclose(step_terms[name], value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(after.opt_state[0].trace), jax.tree.leaves(gradient), strict=True):
        # The gradient of a bias before a normalization is nothing but rounding.
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-6
    norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(step_terms["gradient_norm"], norm, rtol=1e-3)


def test_a_step_in_parts_has_the_loss_and_gradient_of_the_whole_batch(made, whole, in_parts):
    encoder, params, frozen, optimizer = made
    outcome = in_parts(cib.create_train_state(params, optimizer), frozen, IMAGES, KEY)
    assert_first_step(outcome, *expected_step(whole, encoder, "cibhash"))


def test_a_frozen_backbone_in_parts_takes_one_pass_and_gives_the_heads_gradient(made, whole):
    """Its program goes through the network in one loop; that of a trained backbone in two."""
    encoder, params, _, optimizer = made
    frozen, head = {"backbone": params["backbone"]}, {"head": params["head"]}
    method = {"objective": "naive_cl", "temperature": TEMPERATURE, "micro_batch": 16}
    step = traced_step(encoder, optimizer, head, frozen, **method)
    outcome = step.lower().compile()(cib.create_train_state(head, optimizer), frozen, IMAGES, KEY)
    terms, gradient = expected_step(whole, encoder, "naive_cl")
    assert_first_step(outcome, terms, gradient["head"])

    convolutions, of_trained = (
        str(traced.jaxpr).count("= conv_general_dilated[")
        for traced in (step, traced_step(encoder, optimizer, params, {}, **method))
    )
    assert 0 < convolutions < of_trained / 2


def test_one_part_is_the_plain_step(made):
    encoder, params, frozen, optimizer = made
    state = cib.create_train_state(params, optimizer)
    options = {"encoder": encoder, "optimizer": optimizer, "augment": FAMILY}
    lowered = [
        jax.jit(functools.partial(cib.train_step, micro_batch=size, **options)).lower(state, frozen, IMAGES, KEY)
        for size in (len(IMAGES), 0)
    ]
    assert lowered[0].as_text() == lowered[1].as_text()


def test_memory_is_that_of_a_part(made, whole, in_parts):
    """Of the compiled programs: without the second pass, the activations of the whole batch would be kept."""
    of_parts, of_whole = (program.memory_analysis().temp_size_in_bytes for program in (in_parts, whole))
    # A twelfth of the activations, and the sums of gradients, which do not shrink.
    assert of_parts < of_whole / 8 + 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(made[1]))


@pytest.mark.parametrize("micro_batch", [4, 12])
def test_a_size_that_does_not_divide_is_refused(made, micro_batch):
    encoder, params, frozen, optimizer = made
    state = cib.create_train_state(params, optimizer)
    with pytest.raises(ConfigError, match="divisor of the 6 images") as refused:
        cib.train_step(state, frozen, IMAGES[:6], KEY, encoder=encoder, optimizer=optimizer, micro_batch=micro_batch)
    assert refused.value.field == "config.micro_batch"


def test_a_run_refuses_a_size_that_does_not_divide_before_it_claims_anything(tmp_path):
    with pytest.raises(ConfigError) as refused:
        train(small.config(micro_batch=5), tmp_path / "run")
    assert refused.value.field == "config.micro_batch"
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("without_shape_checks")
def test_features_have_no_parts():
    features = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    encoder, params, frozen = cib.create_encoder(KEY, backbone="none", bits=8, standard=standard([features]))
    state = cib.create_train_state(params, optax.sgd(0.1))
    with pytest.raises(ConfigError) as refused:
        cib.train_step(
            state, frozen, features, KEY, encoder=encoder, optimizer=optax.sgd(0.1), augment="noise", micro_batch=2
        )
    assert refused.value.field == "config.micro_batch"
