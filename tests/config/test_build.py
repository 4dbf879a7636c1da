"""Objects that a config describes: random streams, methods, and weights that are loaded only if they are needed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import configs.beyond
import configs.cifar
import configs.cifar_vgg16
import configs.features
from cib_jax import losses
from cib_jax.config import build
from cib_jax.errors import ConfigError
from cib_jax.models import registry
from tests import small


def fine_tuned():
    config = configs.cifar.get_config()
    config.frozen = False
    config.train.views = 0
    config.image_size = 32
    return config


def test_a_fine_tuned_backbone_is_taken_from_its_checkpoint_alone(monkeypatch):
    """Of the same structure as at the start of training, but without reading the published weights again."""
    _, started, nothing, fingerprint = build.encoder(fine_tuned())
    assert (nothing, fingerprint) == ({}, "")
    monkeypatch.setattr(build.weights, "load_pretrained", None)
    _, template, _, _ = build.encoder(fine_tuned(), trained=True)
    shapes = [jax.tree.map(np.shape, params) for params in (started, template)]
    assert shapes[0] == shapes[1]


def test_a_frozen_backbone_is_loaded_and_known_by_its_fingerprint():
    config = configs.cifar.get_config()
    _, params, frozen, fingerprint = build.encoder(config, trained=True)
    assert set(params) == {"head"}
    assert set(frozen) == {"backbone"}
    assert len(fingerprint) == 16


def test_a_method_has_every_field_that_the_config_has():
    config = small.config(
        temperature=0.7, beta=0.2, sharpness=3.0, micro_batch=4, head_dropout=0.5, binary="deterministic"
    )
    encoder = build.encoder(config)[0]
    method = build.method(config, encoder)
    expected = {"temperature": 0.7, "beta": 0.2, "sharpness": 3.0, "micro_batch": 4, "head_dropout": 0.5}
    expected["stochastic"] = False
    assert {name: getattr(method, name) for name in expected} == expected
    assert (method.encoder, method.objective, method.augment) == (encoder, "cibhash", "digits")


@pytest.mark.parametrize(("objective", "temperature"), [("cibhash", 0.3), ("naive_cl", 0.3), ("diffusion", 0.0)])
def test_a_temperature_of_zero_is_that_of_the_objective(objective, temperature):
    config = small.config(objective=objective, temperature=0.0)
    assert build.method(config, build.encoder(config)[0]).temperature == temperature


def test_cifar_vgg16_is_the_published_experiment():
    """Section 4.2 of the paper and, for dropout, the VGG-16 of its published code."""
    config = configs.cifar_vgg16.get_config()
    protocol, network = build.protocol(config), registry.get(config.backbone)
    assert (network.name, config.image_size, network.image_size, network.features) == ("vgg16", 224, 224, 4096)
    assert (network.mean, network.deviation) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (config.frozen, config.hidden, config.head_dropout, config.train.views) == (True, 1024, 0.5, 0)
    assert (config.objective, config.beta, config.binary) == ("cibhash", 0.001, "stochastic")
    assert (config.temperature, losses.default_temperature("cibhash")) == (0.0, 0.3)
    assert (config.batch_size, config.learning_rate) == (64, 0.001)
    assert (protocol.k, protocol.train_per_class, protocol.pooled) == (1000, 500, False)
    epochs = {}
    for config.bits in (16, 32, 64):
        epochs[config.bits] = build.schedule(config, 5000).epochs
    assert epochs == {16: 80, 32: 60, 64: 60}


@pytest.mark.parametrize("objective", ["cibhash", "diffusion"])
def test_epochs_and_batch_size_are_taken_as_they_are(objective):
    planned = build.schedule(small.config(objective=objective, bits=16, epochs=7, batch_size=9), 50_000)
    assert (planned.epochs, planned.batch_size) == (7, 9)


@pytest.mark.parametrize(("images", "batch_size", "epochs", "of_teacher"), [(50_000, 128, 10, 20), (1500, 64, 60, 60)])
def test_past_the_paper_they_follow_from_the_number_of_images(images, batch_size, epochs, of_teacher):
    config = configs.beyond.get_config()
    planned, teacher = build.schedule(config, images), build.teacher_config(config, images)
    assert (planned.batch_size, planned.epochs) == (batch_size, epochs)
    assert (teacher.batch_size, teacher.epochs) == (batch_size, of_teacher)
    assert build.schedule(small.config(epochs=0, batch_size=0), images).batch_size == 64


def updates(steps, **fields):
    """Returns the updates of three parameters of 2 by gradients of (3, 4, 0) at every step."""
    optimizer = build.optimizer(small.config(**fields), steps)
    params, gradient = {"head": jnp.full(3, 2.0)}, {"head": jnp.array([3.0, 4.0, 0.0])}
    state, found = optimizer.init(params), []
    assert jax.tree.structure(state) == jax.tree.structure(build.optimizer(small.config(**fields)).init(params))
    for _ in range(steps):
        update, state = optimizer.update(gradient, state, params)
        found.append(np.asarray(update["head"], float))
    return np.array(found)


def test_the_default_optimizer_is_adam_to_the_bit():
    made, plain = build.optimizer(small.config(learning_rate=0.25), 9), optax.adam(0.25)
    params = {"head": jnp.full(3, 2.0)}
    assert jax.tree.structure(made.init(params)) == jax.tree.structure(plain.init(params))
    found, expected = (rule.update({"head": jnp.arange(3.0)}, rule.init(params), params)[0] for rule in (made, plain))
    assert np.array_equal(found["head"], expected["head"])


def test_the_learning_rate_follows_its_schedule():
    """Adam's step for a constant gradient is the learning rate, whatever the gradient's size."""
    warm = np.array([0, 0.25, 0.5, 0.75])
    constant = updates(6, learning_rate=0.5, warmup_steps=4)
    np.testing.assert_allclose(-constant[:, 0], 0.5 * np.concatenate([warm, [1, 1]]), rtol=1e-4)
    cosine = updates(12, learning_rate=0.5, warmup_steps=4, learning_rate_schedule="cosine")
    falling = (1 + np.cos(np.pi * np.arange(8) / 8)) / 2
    np.testing.assert_allclose(-cosine[:, 1], 0.5 * np.concatenate([warm, falling]), rtol=1e-4)
    without_warmup = updates(8, learning_rate=0.5, learning_rate_schedule="cosine")
    np.testing.assert_allclose(-without_warmup[:, 1], 0.5 * falling, rtol=1e-4)


def test_weights_decay_apart_from_the_gradient():
    """AdamW takes learning rate × decay × the parameter away, besides Adam's step."""
    decayed = updates(1, learning_rate=0.5, weight_decay=0.1) - updates(1, learning_rate=0.5)
    np.testing.assert_allclose(decayed, np.full((1, 3), -0.5 * 0.1 * 2), rtol=1e-5)


@pytest.mark.parametrize(("limit", "scale"), [(2.5, 0.5), (10.0, 1.0)])
def test_a_longer_gradient_is_scaled_to_the_limit(limit, scale):
    """A gradient of length 5, by Adam's first moment: a tenth of the gradient after one step."""
    optimizer = build.optimizer(small.config(clip_norm=limit))
    gradient = {"head": jnp.array([3.0, 4.0, 0.0])}
    _, (_, (adam, *_)) = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose(adam.mu["head"], 0.1 * scale * np.array([3, 4, 0]), rtol=1e-5)


@pytest.mark.parametrize(("augment", "objective"), [("noise", "cibhash"), ("stored", "naive_cl")])
def test_a_teacher_on_features_learns_by_what_its_views_are(augment, objective):
    config = configs.features.get_config()
    config.objective, config.augment = "diffusion", augment
    assert build.teacher_config(config, 900).objective == objective


def test_a_teachers_config_is_the_same_but_for_head_and_objective():
    teacher = {"teacher__bits": 24, "teacher__temperature": 0.15, "teacher__epochs": 7}
    config = small.config(objective="diffusion", nested=True, **teacher)
    theirs = build.teacher_config(config, 900)
    assert (theirs.objective, theirs.bits, theirs.temperature, theirs.epochs) == ("naive_cl", 24, 0.15, 7)
    assert not theirs.nested
    changed = {"objective": "diffusion", "bits": 16, "temperature": config.temperature, "epochs": 3, "nested": True}
    theirs.update(changed)
    assert theirs.to_dict() == config.to_dict()
    assert build.teacher_config(small.config(objective="diffusion"), 900).epochs == 3


def test_runs_that_differ_in_their_seed_alone_share_splits_and_bank():
    one, other, elsewhere = (small.config(**fields) for fields in ({}, {"seed": 1}, {"data__seed": 1}))
    bank = [jax.random.key_data(build.key(config, "view bank")).tolist() for config in (one, other, elsewhere)]
    assert bank[0] == bank[1] != bank[2]
    labels = [build.draw_splits(config).query.labels for config in (one, other, elsewhere)]
    assert np.array_equal(labels[0], labels[1])
    assert not np.array_equal(labels[0], labels[2])


@pytest.mark.parametrize(
    "field",
    [
        {"k": 5000},
        {"batch_size": 5000},
        {"train__views": 100, "train__bank_mb": 30, "backbone": "efficientnet_lite0", "frozen": True},
    ],
    ids=str,
)
def test_fields_that_do_not_fit_the_images_are_refused(field):
    config = small.config(**field)
    with pytest.raises(ConfigError) as refused:
        build.draw_splits(config)
    assert refused.value.field == f"config.{next(iter(field)).replace('__', '.')}"


def test_images_held_out_for_validation_are_refused_where_it_needs_none():
    config = small.config(train__validate_by="separation", data__validation="query_half")
    with pytest.raises(ConfigError) as caught:
        build.draw_splits(config)
    assert caught.value.field == "config.train.validate_by"


def test_a_teacher_is_not_validated():
    config = small.config(train__validate_by="separation", objective="diffusion")
    assert build.teacher_config(config, 900).train.validate_by == "map"
