"""The encoder: its split into pure functions, its start, its errors."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cib_jax as cib
from cib_jax.augment.features import Standard
from cib_jax.errors import UserError
from cib_jax.models import encoder
from cib_jax.models.encoder import create_encoder
from tests import pretrained


@pytest.fixture(scope="module")
def small():
    return create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)


def test_the_logits_are_the_head_of_the_features(small):
    """The head worked out by hand: Linear, ReLU, Linear."""
    encoder, params, frozen = small
    views = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    features = np.asarray(jax.jit(encoder.features)(params, frozen, views), np.float64)
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["head"])
    hidden = np.maximum(features @ head["hidden"]["kernel"] + head["hidden"]["bias"], 0)
    expected = hidden @ head["out"]["kernel"] + head["out"]["bias"]
    np.testing.assert_allclose(jax.jit(encoder.logits)(params, frozen, views), expected, rtol=1e-4, atol=1e-6)


def test_an_encoder_and_a_hasher_are_printed_in_one_line(small):
    standard = Standard(np.zeros(384, np.float32), np.ones(384, np.float32))
    of_features = create_encoder(jax.random.key(0), backbone="none", bits=64, standard=standard, hidden=4)
    assert str(of_features[0]) == "Encoder(none, 384 features → 64 bits)"
    assert str(cib.Hasher(*small)) == str(small[0]).replace("Encoder", "Hasher") and "convnet" in str(small[0])


def test_the_head_starts_as_torch_linear_does(small):
    """Uniform within ±1/√inputs: bound kept, and the deviation that of a uniform distribution, bound/√3."""
    _, params, _ = small
    for layer, inputs in (("hidden", 256), ("out", 1024)):
        kernel = np.asarray(params["head"][layer]["kernel"])
        bound = inputs**-0.5
        assert np.abs(kernel).max() <= bound
        assert abs(kernel.std() / (bound / 3**0.5) - 1) < 0.05
        assert np.abs(params["head"][layer]["bias"]).max() <= bound


def test_the_same_network_is_one_encoder_and_shares_its_programs(small):
    def features(mean):
        standard = Standard(np.float32([mean, 0]), np.float32([1, 1]))
        return create_encoder(jax.random.key(0), backbone="none", bits=16, hidden=4, standard=standard)[0]

    encoder = create_encoder(jax.random.key(1), backbone="convnet", bits=16, image_size=16)[0]
    assert encoder is small[0] and hash(encoder) == hash(small[0])
    one = features(0)
    assert features(0) is one and features(1) is not one
    for other in ({"bits": 8}, {"image_size": 8}, {"hidden": 8}, {"backbone_dtype": "bfloat16"}):
        made = create_encoder(jax.random.key(0), **{"backbone": "convnet", "bits": 16, "image_size": 16} | other)
        assert made[0] is not encoder


def test_the_same_key_gives_the_same_parameters():
    first, second, other = (
        jax.tree.leaves(create_encoder(jax.random.key(k), backbone="convnet", bits=8, image_size=8)[1])
        for k in (3, 3, 4)
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[-1], other[-1])


def test_a_pretrained_backbone_is_frozen_unless_asked_otherwise(monkeypatch, tmp_path):
    fields = pretrained.convnet(monkeypatch, tmp_path, 8)
    weights = cib.load_pretrained("convnet", fields["backbone_weights"])
    options = {"backbone": "convnet", "bits": 16, "image_size": 8, "backbone_params": weights}
    encoder, params, frozen = create_encoder(jax.random.key(0), **options)
    assert set(params) == {"head"}
    assert set(frozen) == {"backbone"}
    _, trained, nothing = create_encoder(jax.random.key(0), frozen=False, **options)
    assert set(trained) == {"head", "backbone"}
    assert nothing == {}
    views = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    features = jax.jit(encoder.features)
    assert np.array_equal(features(params, frozen, views), features(trained, nothing, views))


def test_preprocessing_is_of_the_backbones_size_and_normalization(small):
    encoder, _, _ = small
    images = np.full((1, 8, 8, 3), 255, np.uint8)
    np.testing.assert_allclose(jax.jit(encoder.preprocess)(images), np.ones((1, 16, 16, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"bits": 0}, "bits"),
        ({"image_size": 4}, "image_size"),
        ({"frozen": True}, "frozen"),
        ({"standard": Standard(np.zeros(2, np.float32), np.ones(2, np.float32))}, "standard"),
        ({"backbone": "vgg16", "image_size": 32}, "backbone_params"),
        ({"backbone_params": {"kernel": np.zeros(3)}}, "backbone_params"),
        ({"backbone_dtype": "float8"}, "backbone_dtype"),
    ],
)
def test_bad_input_is_refused(options, field):
    with pytest.raises(UserError) as refused:
        create_encoder(jax.random.key(0), **({"backbone": "convnet", "bits": 16, "image_size": 16} | options))
    assert refused.value.field == field


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="resnet"):
        create_encoder(jax.random.key(0), backbone="resnet", bits=16)


def test_a_backbone_in_bfloat16_gives_float32_features_near_those_of_float32():
    views = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 16, 3)), jnp.float32)
    features = {}
    for dtype in ("float32", "bfloat16"):
        encoder, params, frozen = create_encoder(
            jax.random.key(0), backbone="convnet", bits=8, image_size=16, backbone_dtype=dtype
        )
        features[dtype] = jax.jit(encoder.features)(params, frozen, views)
        assert features[dtype].dtype == jnp.float32
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    error = np.linalg.norm(features["bfloat16"] - features["float32"]) / np.linalg.norm(features["float32"])
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    "platform, capability, dtype",
    [
        ("tpu", None, "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "gfx90a", "float32"),
        ("cpu", None, "float32"),
    ],
)
def test_a_frozen_backbone_is_in_bfloat16_where_there_are_units_for_it(platform, capability, dtype):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert encoder.default_dtype(True, device) == dtype
    assert encoder.default_dtype(False, device) == "float32"


def test_a_frozen_backbone_in_bfloat16_is_held_in_bfloat16(monkeypatch, tmp_path):
    pretrained.convnet(monkeypatch, tmp_path, 8)
    how = {"image_size": 8, "frozen": True, "pretrained": False, "backbone_dtype": "bfloat16"}
    _, _, frozen = create_encoder(jax.random.key(0), backbone="convnet", bits=8, **how)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
