"""Training in one call: it learns, repeats itself, equals run.py bit by bit, and refuses what cannot work."""

import functools

import jax
import numpy as np
import pytest
import rich.console
import sklearn.datasets

import cib_jax as cib
from cib_jax.commands.train import train
from cib_jax.config import build
from cib_jax.errors import UserError
from cib_jax.inference.serialization import restore_best
from cib_jax.models import weights
from tests import pretrained, small

pytestmark = pytest.mark.usefixtures("compiled_to_run", "few_digits")


@pytest.fixture(scope="module")
def digits():
    digits = sklearn.datasets.load_digits()
    return np.repeat(np.round(digits.images * 15.9375).astype(np.uint8)[..., None], 3, -1), digits.target


def fit(images, **options):
    small = {"bits": 16, "image_size": 8, "augment": "digits", "batch_size": 32, "epochs": 8, "stochastic": False}
    return cib.fit(images, **small | options)


@pytest.mark.slow
def test_it_learns(digits):
    """MAP well above that of random codes, a tenth. Of fewer epochs: tests/end_to_end/test_readme.py."""
    images, labels = digits
    losses = []
    hasher = fit(images[:500], image_size=16, on_epoch=lambda report: losses.append(report.terms["loss"]))
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5
    codes = hasher.encode(images[:700])
    assert cib.mean_average_precision(codes[500:], codes[:500], labels[500:700], labels[:500], k=100) > 0.3


def of_run(config, workdir):
    """Returns the parameters of run.py, and the training images."""
    train(config, workdir, console=rich.console.Console(quiet=True))
    params, _, _ = restore_best(workdir, build.encoder(config)[1], config)
    images = build.draw_splits(config).train.images
    return params, np.stack([images[index] for index in range(len(images))])


def assert_same(params, others):
    leaves, other_leaves = jax.tree.leaves(params), jax.tree.leaves(others)
    assert len(leaves) == len(other_leaves)
    assert all(np.array_equal(a, b) for a, b in zip(leaves, other_leaves, strict=True))


TEACHER = {"bits": 20, "dimensions": 8, "neighbours": 5, "epochs": 1}
COMMON = {"epochs": 2} | small.FEW_DIGITS


def options_of(config):
    names = (
        "bits",
        "backbone",
        "frozen",
        "image_size",
        "hidden",
        "objective",
        "temperature",
        "beta",
        "sharpness",
        "nested",
    )
    named = {name: config[name] for name in (*names, "augment", "epochs", "batch_size", "learning_rate", "seed")}
    for name in ("temperature", "batch_size"):  # 0 is a default that fit has, too
        if not named[name]:
            del named[name]
    return named | {"views": config.train.views, "stochastic": config.binary == "stochastic"}


def test_fit_and_run_end_with_the_same_bits(tmp_path):
    """On fresh views."""
    config = small.config(objective="cibhash", seed=3, temperature=0.0, **COMMON | {"epochs": 6})
    params, images = of_run(config, tmp_path / "run")
    losses = []
    hasher = cib.fit(images, on_epoch=lambda report: losses.append(report.terms["loss"]), **options_of(config))
    assert_same(params, hasher.params)
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_fit_and_run_end_with_the_same_bits_on_a_bank(tmp_path, monkeypatch):
    """With nested codes, the dropout, temperature and batch size that `fit` takes, and the teacher of "diffusion".

    The teacher takes also the frozen backbone's features.
    """
    fields = COMMON | pretrained.convnet(monkeypatch, tmp_path, 8) | {f"teacher__{k}": v for k, v in TEACHER.items()}
    fields |= {"objective": "diffusion", "bits": 20, "nested": True, "head_dropout": 0.5, "temperature": 0.0}
    config = small.config(**fields, batch_size=0, train__views=3)
    params, images = of_run(config, tmp_path / "run")
    loaded = weights.load_pretrained("convnet", config.backbone_weights)
    views, epochs = [], []
    hasher = cib.fit(
        images,
        teacher=cib.Teacher(**TEACHER),
        backbone_params=loaded,
        on_views=views.append,
        on_epoch=lambda report: epochs.append(report.progress.epoch),
        **options_of(config),
    )
    assert_same(params, hasher.params)
    assert sum(views) == 3 * len(images)
    assert epochs == [1, 1, 2]  # the teacher's and the codes'


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": 31}, "batch_size"),
        ({"views": 1}, "views"),
        ({"views": 2}, "views"),  # of a backbone that is trained
        ({"temperature": 0.0}, "temperature"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"frozen": True}, "frozen"),
        ({"epochs": 0}, "epochs"),
        ({"sharpness": 0.0}, "sharpness"),
        ({"bits": 0}, "bits"),
        ({"objective": "other"}, "objective"),
        ({"micro_batch": 3}, "config.micro_batch"),
        ({"micro_batch": 2, "views": 2}, "micro_batch"),
    ],
    ids=str,
)
def test_bad_options_are_refused(digits, options, field):
    with pytest.raises(UserError) as refused:
        fit(digits[0][:30], **({"batch_size": 8} | options))
    assert refused.value.field == field


def test_unknown_options_and_families_are_refused(digits):
    with pytest.raises(TypeError, match="temprature"):
        fit(digits[0][:30], batch_size=8, temprature=0.3)
    with pytest.raises(ValueError, match="other"):
        fit(digits[0][:30], batch_size=8, augment="other")


def test_other_images_are_refused(digits):
    for images in ([digits[0][0], digits[0][0][:5]], digits[0].astype(np.float32), digits[0][:0]):
        with pytest.raises(UserError) as refused:
            fit(images)
        assert refused.value.field == "images"


def grouped(views=0):
    """Returns eight overlapping clusters in 64 dimensions, and their labels."""
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 8
    centers = generator.normal(size=(8, 64))
    noise = generator.normal(size=(300, views, 64) if views else (300, 64))
    return (centers[labels][:, None] if views else centers[labels]) + noise, labels


@pytest.mark.parametrize(("views", "augment"), [(0, "noise"), (3, "stored")])
def test_features_are_hashed_better_than_by_random_planes(views, augment):
    features, labels = grouped(views)
    hasher = cib.fit(features, backbone="none", augment=augment, bits=16, epochs=15, hidden=64, batch_size=50)
    plain = features[:, 0] if views else features
    planes = np.random.default_rng(1).normal(size=(64, 16))
    random = np.packbits((plain - plain.mean(0)) @ planes > 0, axis=1)
    learned, by_planes = (
        cib.mean_average_precision(codes[:60], codes[60:], labels[:60], labels[60:], k=240)
        for codes in (hasher.encode(features), random)
    )
    assert learned > by_planes + 0.1


def test_vectors_alone_are_enough():
    """Takes settings that suit them: no backbone, views by noise, and a batch of all where there are few."""
    features = grouped()[0][:40]
    named = {"backbone": "none", "augment": "noise", "batch_size": 40}
    codes, same = (cib.fit(features, bits=16, epochs=1, hidden=8, **more).encode(features) for more in ({}, named))
    np.testing.assert_array_equal(codes, same)


def test_half_precision_features_are_standardized_in_single_precision():
    features = (1000 + grouped()[0]).astype(np.float16)
    codes = [
        cib.fit(array, backbone="none", augment="noise", bits=8, epochs=1, hidden=16).encode(array)
        for array in (features, features.astype(np.float32))
    ]
    assert np.array_equal(*codes)


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.longdouble])
@pytest.mark.usefixtures("without_shape_checks")
def test_features_in_other_byte_orders_or_longer_ones_are_converted(dtype):
    features = grouped()[0].astype(np.float32)
    fit = functools.partial(cib.fit, backbone="none", augment="noise", bits=8, epochs=1, hidden=16)
    expected = fit(features)
    assert np.array_equal(fit(features.astype(dtype)).encode(features.astype(dtype)), expected.encode(features))


@pytest.mark.parametrize(
    ("features", "options", "field"),
    [
        (np.zeros((80, 4), np.int64), {}, "images"),
        (np.full((80, 4), np.nan), {}, "images"),
        (np.full((80, 4), 1e39), {}, "images"),
        (np.ones((80, 4)), {"views": 2}, "views"),
        (np.ones((80, 4)), {"micro_batch": 2}, "micro_batch"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, options, field):
    with pytest.raises(UserError) as refused:
        cib.fit(features, **{"backbone": "none", "augment": "noise", "epochs": 1, "hidden": 8} | options)
    assert refused.value.field == field


@pytest.mark.parametrize("augment", ["photo", "stored"])
def test_views_that_features_do_not_have_are_refused(augment):
    with pytest.raises(ValueError, match=augment):
        cib.fit(np.ones((80, 4)), backbone="none", augment=augment, epochs=1, hidden=8)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_hasher_of_features_takes_no_others():
    features, _ = grouped()
    hasher = cib.fit(features, backbone="none", augment="noise", bits=8, epochs=1, hidden=16)
    for wrong in (features[:, :5], features.astype(int), np.zeros((2, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="images"):
            hasher.encode(wrong)
    assert hasher.encode(features[:0]).shape == (0, 1)
