"""Which wishes for fine-tuning are refused, of a config and of functions, and what runs without any are."""

import jax
import numpy as np
import pytest

import cib_jax as cib
from cib_jax.config import schema
from cib_jax.config.schema import flatten
from cib_jax.errors import ConfigError
from cib_jax.models.finetune import FineTune
from tests import small

IMAGES = np.zeros((12, 8, 8, 3), np.uint8)
WEIGHTS = cib.create_encoder(jax.random.key(3), backbone="convnet", bits=8, image_size=8)[1]["backbone"]


def create(**how):
    return cib.create_encoder(
        jax.random.key(0), backbone="convnet", bits=16, image_size=8, backbone_params=WEIGHTS, fine_tune=FineTune(**how)
    )


EFFICIENTNET = {"backbone": "efficientnet_lite0", "frozen": False, "image_size": 32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fine_tune__blocks": -1}, r"config.fine_tune.blocks: -1 must be 0 or more"),
        ({"fine_tune__lora_alpha": 0.0}, r"config.fine_tune.lora_alpha: 0.0 must be greater than 0"),
        ({"fine_tune__blocks": 1}, r"config.fine_tune.blocks: convnet starts from random weights.* set it to 0"),
        ({"fine_tune__lora_rank": 4}, r"config.fine_tune.lora_rank: convnet starts from random weights"),
        (
            EFFICIENTNET | {"fine_tune__blocks": 17},
            r"config.fine_tune.blocks: 17 is more than the 16 blocks of efficientnet_lite0; lower it, or 0",
        ),
        (
            EFFICIENTNET | {"fine_tune__lora_rank": 17},
            r"config.fine_tune.lora_rank: 17 is more than the 16 that blocks/0/project/kernel of",
        ),
        *(
            (
                EFFICIENTNET | {"frozen": True, f"fine_tune__{name}": value},
                rf"config.fine_tune.{name}: {value} is for a backbone that learns, and this one is frozen; set frozen",
            )
            for name, value in (("blocks", 1), ("lora_rank", 2), ("checkpointing", True), ("learning_rate", 0.1))
        ),
        (EFFICIENTNET | {"fine_tune__blocks": 1, "train__views": 2}, r"config.train.views: features can be computed"),
        (
            {
                "data__name": "features", "backbone": "none", "augment": "noise", "frozen": True, "image_size": 0,
                "fine_tune__checkpointing": True,
            },
            r"config.fine_tune.checkpointing: it is for images; set it to False for features",
        ),
    ],
)  # fmt: skip
def test_a_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        schema.validate(small.unchecked(**fields))


def test_the_same_is_refused_of_functions():
    with pytest.raises(cib.Refusal, match=r"^fine_tune.blocks: 4 is more than the 3 blocks of convnet"):
        create(blocks=4)
    with pytest.raises(cib.Refusal, match=r"^fine_tune.lora_rank: convnet starts from random weights"):
        cib.fit(IMAGES, batch_size=6, fine_tune=FineTune(lora_rank=2))
    with pytest.raises(ValueError, match=r"views: 2 views are computed once only of a frozen backbone"):
        cib.fit(IMAGES, batch_size=6, backbone_params=WEIGHTS, image_size=8, views=2, fine_tune=FineTune(lora_rank=2))
    with pytest.raises(cib.Refusal, match=r"^fine_tune.learning_rate: nan must be 0 or more"):
        create(learning_rate=float("nan"))
    for name in ("blocks", "lora_rank"):
        with pytest.raises(cib.Refusal, match=rf"^fine_tune.{name}: 1.5 must be a whole number"):
            create(**{name: 1.5})


@pytest.mark.parametrize("name", ["blocks", "lora_rank"])
def test_random_weights_are_refused_where_published_ones_would_do(name):
    with pytest.raises(cib.Refusal, match=rf"^fine_tune.{name}: efficientnet_lite0 starts from random weights"):
        cib.create_encoder(
            jax.random.key(0), backbone="efficientnet_lite0", bits=8, pretrained=False, fine_tune=FineTune(**{name: 1})
        )


def test_a_run_of_an_earlier_version_differs_in_nothing():
    mine = flatten(small.config())
    theirs = {name: value for name, value in mine.items() if not name.startswith("fine_tune.")}
    assert schema.differences(mine, theirs) == []
    asked = flatten(small.config(fine_tune__learning_rate=0.5))
    assert schema.differences(asked, theirs) == ["fine_tune.learning_rate: 0.0 → 0.5"]
