"""Every bad value is refused by an error that names the field and the value, and every field has a type and a rule."""

import importlib
import pathlib

import pytest

import configs.default
from cib_jax.config import build, flatten, schema
from cib_jax.errors import ConfigError
from cib_jax.models import registry
from tests import small

SIDE_BY_SIDE = {"backbone": "efficientnet_lite1+2", "image_size": 32, "frozen": False}
EXPERIMENTS = sorted(path.stem for path in pathlib.Path(configs.__path__[0]).glob("[!_]*.py"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_experiments_are_valid(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    schema.validate(config)
    assert config.tune.score != "validation_map" or build.protocol(config).validation != "none"


@pytest.mark.parametrize(
    ("fields", "field", "mentioned"),
    [
        ({"bits": 0}, "bits", ("0",)),
        ({"bits": 8192}, "bits", ("8192", "4096")),
        ({"batch_size": 1}, "batch_size", ("0", "1", "2")),
        ({"batch_size": -64}, "batch_size", ("-64",)),
        ({"backbone": "resnet"}, "backbone", ("'resnet'", "resnet50", "vgg16", "none")),
        ({"backbone": ""}, "backbone", ("''", "efficientnet_lite0")),
        ({"objective": "simclr"}, "objective", ("'simclr'", "naive_cl, cl_hash, cibhash")),
        ({"binary": "soft"}, "binary", ("'soft'", "stochastic, deterministic")),
        ({"augment": "none"}, "augment", ("'none'", "photo, digits")),
        ({"temperature": -0.1}, "temperature", ("-0.1", "0")),
        ({"temperature": float("nan")}, "temperature", ("nan",)),
        ({"beta": -0.1}, "beta", ("-0.1",)),
        ({"learning_rate": float("inf")}, "learning_rate", ("inf",)),
        ({"epochs": -1}, "epochs", ("0", "-1")),
        ({"seed": -1}, "seed", ("-1",)),
        ({"bits": "32"}, "bits", ("'32'", "str", "int")),
        ({"frozen": 1}, "frozen", ("1", "int", "bool")),
        ({"data__name": ""}, "data.name", ("''",)),
        ({"k": -2}, "k", ("-2", "-1")),
        ({"data__max_bad_fraction": 1.5}, "data.max_bad_fraction", ("1.5",)),
        ({"data__max_megapixels": 500}, "data.max_megapixels", ("500", "178")),
        ({"data__protocol": "cifar"}, "data.protocol", ("'cifar'", "own, cifar10-10k-50k")),
        ({"feature_dropout": 1.0}, "feature_dropout", ("1.0",)),
        ({"head_dropout": 1.0}, "head_dropout", ("1.0",)),
        ({"learning_rate_schedule": "linear"}, "learning_rate_schedule", ("'linear'", "constant, cosine")),
        ({"data__name": "features"}, "backbone", ("'convnet'", "config.data.name=features")),
        ({"augment": "noise"}, "augment", ("'noise'", "photo, digits", "images")),
        ({"train__views": 1}, "train.views", ("1", "2")),
        ({"data__validation": "half"}, "data.validation", ("'half'", "protocol, none, query_half, database")),
        ({"train__validate_by": "loss"}, "train.validate_by", ("'loss'", "map, separation")),
        ({"image_size": 4}, "image_size", ("4", "8", "convnet")),
        ({"frozen": True}, "frozen", ("convnet", "False")),
        ({"backbone_weights": "a.pth"}, "backbone_weights", ("convnet",)),
        (SIDE_BY_SIDE | {"backbone_weights": "a.pth"}, "backbone_weights", ("must be empty", "efficientnet_lite1+2")),
        (SIDE_BY_SIDE | {"fine_tune__blocks": 1}, "fine_tune.blocks", ("must be 0", "or train all")),
        (SIDE_BY_SIDE | {"fine_tune__lora_rank": 4}, "fine_tune.lora_rank", ("must be 0", "or train all")),
        ({"train__views": 4}, "train.views", ("config.frozen",)),
    ],
)
def test_a_bad_value_is_refused(fields, field, mentioned):
    with pytest.raises(ConfigError) as caught:
        schema.validate(small.unchecked(**fields))
    assert caught.value.field == f"config.{field}" and f"config.{field}" in str(caught.value)
    assert [words for words in mentioned if words not in str(caught.value)] == []


def test_a_config_built_on_the_default_downloads_nothing():
    config = configs.default.get_config()
    assert registry.get(config.backbone).convert is None  # no published weights
    assert len(build.draw_splits(config).query) == config.data.queries  # drawn from scikit-learn's digits


def test_a_missing_field_is_named():
    config = small.config()
    del config.temperature
    with pytest.raises(ConfigError) as caught:
        schema.validate(config)
    assert caught.value.field == "config.temperature"


def test_an_unknown_field_is_named_with_one_like_it():
    config = small.config()
    config.train.view = 10
    with pytest.raises(ConfigError, match=r"train\.views") as caught:
        schema.validate(config)
    assert caught.value.field == "config.train.view"


def test_every_number_and_choice_has_a_rule():
    """Flags, paths and names of a data set's features may have any value; all else is limited."""
    unlimited = {name for name in schema.FIELDS if name not in schema.RULES}
    assert schema.RULES.keys() <= schema.FIELDS.keys()
    assert {schema.FIELDS[name] for name in unlimited} <= {bool, str}
    assert all(allowed(value) for name, value in flatten(configs.default.get_config()).items()
               for allowed, _ in [schema.RULES.get(name, (lambda value: True, ""))])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "value"), [("bits", "16", 16), ("beta", "1e-3", 1e-3), ("frozen", "True", True)]
)
def test_a_value_is_parsed_by_the_type_of_its_default(name, text, value):
    assert schema.parsed(name, text, "--flag") == value


@pytest.mark.parametrize(("name", "text"), [("bits", "many"), ("bits", "0"), ("frozen", "yes"), ("beta", "nan")])
def test_text_that_is_not_allowed_is_refused_by_the_flag(name, text):
    with pytest.raises(ConfigError) as caught:
        schema.parsed(name, text, "--flag")
    assert caught.value.field == "--flag"


def test_differences_name_both_values_and_ignore_paths():
    mine = flatten(small.config(bits=32, data__dir="elsewhere"))
    theirs = flatten(small.config())
    assert schema.differences(mine, theirs) == ["bits: 16 → 32"]
    assert schema.differences(mine, mine) == []


def test_the_temperature_of_an_objective_is_no_difference_from_its_number():
    """Runs of earlier versions name the number."""
    mine, theirs = ({"objective": "cibhash", "temperature": temperature} for temperature in (0.0, 0.3))
    assert schema.differences(mine, theirs) == []
    assert schema.differences(mine | {"objective": "diffusion"}, theirs | {"objective": "diffusion"}) == [
        "temperature: 0.3 → 0.0"
    ]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"augment": "photo"}, "augment"),
        ({"frozen": False}, "frozen"),
        ({"image_size": 32}, "image_size"),
        ({"train__views": 4}, "train.views"),
        ({"data__stored_size": 64}, "data.stored_size"),
        ({"data__name": "digits"}, "backbone"),
    ],
)
def test_features_have_no_network_to_set(fields, field):
    features = {"data__name": "features", "backbone": "none", "augment": "noise", "frozen": True, "image_size": 0}
    schema.validate(small.config(**features))
    with pytest.raises(ConfigError) as caught:
        schema.validate(small.config(**features | fields))
    assert caught.value.field == f"config.{field}"
