"""Training in one call: it learns, twice the same, and refuses what cannot work."""

import numpy as np
import pytest
import sklearn.datasets

import cib_jax as cib

pytestmark = pytest.mark.usefixtures("compiled_as_for_users")  # it trains for hundreds of steps


@pytest.fixture(scope="module")
def digits():
    digits = sklearn.datasets.load_digits()
    return np.repeat(np.round(digits.images * 15.9375).astype(np.uint8)[..., None], 3, -1), digits.target


def fit(images, **options):
    small = {"bits": 16, "image_size": 16, "augment": "digits", "batch_size": 32, "epochs": 8, "stochastic": False}
    return cib.fit(images, **small | options)


def test_it_learns_and_repeats_itself(digits):
    """MAP well above that of random codes, which is the share of a class, a tenth."""
    images, labels = digits
    losses = []
    hasher = fit(images[:500], on_epoch=lambda report: losses.append(report.terms["loss"]))
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5
    codes = hasher.encode(images[:700])
    assert cib.mean_average_precision(codes[500:], codes[:500], labels[500:700], labels[:500], k=100) > 0.3
    assert np.array_equal(fit(images[:500]).encode(images[:700]), codes)


def test_a_teacher_is_trained_first_and_teaches(digits):
    """As above, by what a walk on the teacher's graph links."""
    images, labels = digits
    epochs = []
    options = {
        "objective": "diffusion",
        "temperature": 0.2,
        "teacher": cib.Teacher(epochs=6, dimensions=20),
        "on_epoch": lambda report: epochs.append(report.progress.epoch),
    }
    codes = fit(images[:500], **options).encode(images[:700])
    assert epochs == [*range(1, 7), *range(1, 9)]
    assert cib.mean_average_precision(codes[500:], codes[:500], labels[500:700], labels[:500], k=100) > 0.3


def test_a_frozen_backbone_trains_on_a_bank(digits):
    images, _ = digits
    weights = cib.load_pretrained("efficientnet_lite0")
    options = {"backbone": "efficientnet_lite0", "backbone_params": weights, "image_size": 32, "batch_size": 8}
    told = []
    few = cib.Teacher(neighbors=3, dimensions=5)
    hasher = fit(images[:20], views=2, epochs=2, objective="diffusion", teacher=few, on_views=told.append, **options)
    assert sum(told) == 40  # one bank for the teacher and the codes
    assert hasher.encode(images[:3]).shape == (3, 2)
    with pytest.raises(ValueError, match=r"views: 2 views are computed once only of a frozen backbone"):
        fit(images[:20], views=2, frozen=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "batch_size: 1 must be from 2 to the number of images, 30"),
        ({"batch_size": 31}, "batch_size: 31"),
        ({"views": 1}, "views: 1 must be 0"),
        ({"temperature": 0.0}, "temperature: 0.0 must be greater than 0"),
        ({"frozen": True}, "frozen: convnet starts from random weights"),
        ({"epochs": 0}, "epochs: 0 must be 1"),
        ({"objective": "diffusion"}, "teacher.dimensions: 50 must be less than the 30 training images"),
        ({"sharpness": 0.0}, "sharpness: 0.0 must be greater than 0"),
        ({"bits": 9}, "bits: 9"),
        ({"objective": "other"}, "objective: 'other'"),
        ({"augment": "other"}, "augment: 'other' is not one of photo, digits"),
    ],
)
def test_bad_options_are_refused(digits, options, message):
    with pytest.raises(ValueError, match=message):
        fit(digits[0][:30], **({"batch_size": 8} | options))


def test_other_images_are_refused(digits):
    with pytest.raises(ValueError, match=r"images: they are of several sizes"):
        fit([digits[0][0], digits[0][0][:5]])
    with pytest.raises(ValueError, match=r"images: wanted uint8 \[images, height, width, 3\], got float32"):
        fit(digits[0].astype(np.float32))


def grouped(views=0):
    """Eight overlapping clusters in 64 dimensions."""
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
    learnt, by_planes = (
        cib.mean_average_precision(codes[:60], codes[60:], labels[:60], labels[60:], k=240)
        for codes in (hasher.encode(features), random)
    )
    assert learnt > by_planes + 0.1


def test_half_precision_features_are_standardised_in_single_precision():
    features = (1000 + grouped()[0]).astype(np.float16)
    codes = [
        cib.fit(array, backbone="none", augment="noise", bits=8, epochs=1, hidden=16).encode(array)
        for array in (features, features.astype(np.float32))
    ]
    assert np.array_equal(*codes)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (np.zeros((80, 4), np.int64), {}, r"got int64 \[80, 4\]"),
        (np.full((80, 4), np.nan), {}, "not finite"),
        (np.ones((80, 4)), {"augment": "photo"}, "augment: 'photo' is not one of noise, stored"),
        (np.ones((80, 4)), {"views": 2}, "views: 2 views are computed once only of a frozen backbone"),
        (np.ones((80, 4)), {"augment": "stored"}, r"features are \[64, 4\], but augment='stored' needs"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, options, message):
    with pytest.raises(ValueError, match=message):
        cib.fit(features, **{"backbone": "none", "augment": "noise", "epochs": 1, "hidden": 8} | options)


def test_a_hasher_of_features_takes_no_others():
    features, _ = grouped()
    hasher = cib.fit(features, backbone="none", augment="noise", bits=8, epochs=1, hidden=8)
    for wrong in (features[:, :5], features.astype(int), np.zeros((2, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"^images .*\[n, 64\]"):
            hasher.encode(wrong)
    assert hasher.encode(features[:0]).shape == (0, 1)
