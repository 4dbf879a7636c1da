"""Training in one call: it learns, twice the same, and refuses what cannot work."""

import numpy as np
import pytest
import sklearn.datasets

import cib_jax as cib


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


def test_a_frozen_backbone_trains_on_a_bank(digits):
    images, _ = digits
    weights = cib.load_pretrained("efficientnet_lite0")
    options = {"backbone": "efficientnet_lite0", "backbone_params": weights, "image_size": 32, "batch_size": 8}
    hasher = fit(images[:20], views=2, epochs=2, **options)
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
