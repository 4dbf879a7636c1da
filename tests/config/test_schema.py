"""Every bad value is refused with its field's name and a way out."""

import importlib
import pathlib

import pytest

import configs.default
from cib_jax.config import build, schema
from cib_jax.config.schema import flatten
from cib_jax.errors import ConfigError
from tests import small

EXPERIMENTS = sorted(path.stem for path in pathlib.Path(configs.__path__[0]).glob("[!_]*.py"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_experiments_are_valid(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    schema.validate(config)
    build.protocol(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 12}, r"config.bits: 12 must be a multiple of 8"),
        ({"bits": 0}, r"config.bits: 0"),
        ({"bits": 8192}, r"config.bits: 8192"),
        ({"batch_size": 1}, r"config.batch_size: 1 must be 2 or more"),
        (
            {"backbone": "resnet"},
            r"config.backbone: 'resnet' is not one of convnet, efficientnet_lite0, .*resnet50, .*vgg16, .*, none; docs",
        ),
        ({"backbone": ""}, r"config.backbone: '' is not one of convnet, efficientnet_lite0"),
        ({"objective": "simclr"}, r"config.objective: 'simclr' is not one of naive_cl, cl_hash, cibhash"),
        ({"binary": "soft"}, r"config.binary: 'soft' is not one of stochastic, deterministic"),
        ({"augment": "none"}, r"config.augment: 'none' is not one of photo, digits"),
        ({"temperature": 0.0}, r"config.temperature: 0.0 must be greater than 0"),
        ({"temperature": float("nan")}, r"config.temperature: nan"),
        ({"beta": -0.1}, r"config.beta: -0.1 must be 0 or more"),
        ({"learning_rate": float("inf")}, r"config.learning_rate: inf"),
        ({"epochs": 0}, r"config.epochs: 0 must be 1 or more"),
        ({"seed": -1}, r"config.seed: -1 must be from 0"),
        ({"bits": "32"}, r"config.bits: '32' is of type str, not int"),
        ({"frozen": 1}, r"config.frozen: 1 is of type int, not bool"),
        ({"data__name": ""}, r"config.data.name: '' must name a data set"),
        ({"k": -2}, r"config.k: -2 must be 0 or more, or -1"),
        ({"data__max_bad_fraction": 1.5}, r"config.data.max_bad_fraction: 1.5 must be from 0 to 1"),
        ({"data__max_megapixels": 500}, r"config.data.max_megapixels: 500 must be from 1 to 178"),
        ({"data__protocol": "cifar"}, r"config.data.protocol: 'cifar' is not one of own, cifar10-10k-50k"),
        ({"feature_dropout": 1.0}, r"config.feature_dropout: 1.0 must be from 0 to below 1"),
        ({"data__name": "features"}, r"config.backbone: convnet does not go with config.data.name=features"),
        ({"augment": "noise"}, r"config.augment: noise makes no views of images; choose photo or digits"),
        ({"train__views": 1}, r"config.train.views: 1 must be 0 .* or at least 2"),
        (
            {"data__validation": "half"},
            r"config.data.validation: 'half' is not one of protocol, none, query_half, database",
        ),
        ({"image_size": 4}, r"config.image_size: 4 is too small for convnet, which takes 8"),
        ({"frozen": True}, r"config.frozen: convnet starts from random weights"),
        ({"backbone_weights": "a.pth"}, r"config.backbone_weights: convnet is trained from scratch"),
        ({"train__views": 4}, r"config.train.views: .*only while the backbone is frozen"),
    ],
)
def test_a_bad_value_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        schema.validate(small.unchecked(**fields))


def test_a_missing_field_is_named():
    config = small.config()
    del config.temperature
    with pytest.raises(ConfigError, match=r"config.temperature: the field is missing"):
        schema.validate(config)


def test_an_unknown_field_is_named():
    config = small.config()
    config.train.view = 10
    with pytest.raises(ConfigError, match=r"config.train.view: there is no such field; did you mean train.views"):
        schema.validate(config)


def test_every_field_of_the_default_is_checked_and_documented():
    assert flatten(configs.default.get_config()).keys() == schema.FIELDS.keys()


def test_differences_are_told_both_ways_but_for_where_the_data_lie():
    mine = flatten(small.config(bits=32, data__dir="elsewhere"))
    theirs = flatten(small.config())
    assert schema.differences(mine, theirs) == ["bits: 16 → 32"]
    assert schema.differences(mine, mine) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augment": "photo"}, r"config.augment: photo makes no views of features; choose noise or stored"),
        ({"frozen": False}, r"config.frozen: features go through no network; leave it at True"),
        ({"image_size": 32}, r"config.image_size: features go through no network; leave it at 0"),
        ({"train__views": 4}, r"config.train.views: it is for images; set it to 0 for features"),
        ({"data__stored_size": 64}, r"config.data.stored_size: it is for images"),
        ({"data__name": "digits"}, r"config.backbone: none does not go with config.data.name=digits"),
    ],
)
def test_features_have_no_network_to_set(fields, message):
    features = {"data__name": "features", "backbone": "none", "augment": "noise", "frozen": True, "image_size": 0}
    schema.validate(small.config(**features))
    with pytest.raises(ConfigError, match=message):
        schema.validate(small.config(**features | fields))
