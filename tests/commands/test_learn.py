"""The batch by which an encoder is learnt for an index, where photos are few and devices are several."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from cib_jax.commands import index
from cib_jax.data.inputs import Photos
from cib_jax.distributed import sharding
from cib_jax.errors import DataError
from tests.commands import indexing

ROOT = pathlib.Path(__file__).parents[2]
FOUND = Photos("/photos", [], "/photos", 1)

PROGRAM = """
import io, json, sys
import jax, numpy as np, rich.console
from cib_jax.data import inputs
from cib_jax.commands import index
from tests.commands.indexing import config

settings = config(backbone="convnet", image_size=16, hidden=16, epochs=1, bits=16, frozen=False, train__views=0,
                  data__stored_size=20, data__train_images=0, batch_size=64)
found = inputs.load_inputs(sys.argv[1], takes="images", size=1)
hasher = index.train_index_encoder(found, settings, rich.console.Console(file=io.StringIO()))
codes = hasher.encode(np.zeros((3, 20, 20, 3), np.uint8))
print(json.dumps({"devices": jax.local_device_count(), "codes": list(codes.shape)}))
"""


def test_photos_that_no_number_of_devices_divides_are_learnt_from(tmp_path):
    indexing.fill(tmp_path / "photos", 22)  # of which four devices share 20
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "photos")]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"devices": 4, "codes": [3, 2]}


@pytest.mark.parametrize(
    ("count", "devices", "batch", "part", "wanted"),
    [
        (500, 4, 64, 8, (64, 8)),  # enough: as it was asked for
        (64, 4, 64, 0, (64, 0)),
        (63, 4, 64, 0, (60, 0)),
        (22, 8, 64, 0, (16, 0)),
        (63, 2, 64, 16, (32, 16)),
        (63, 4, 64, 16, (60, 0)),  # 15 on each device are fewer than 16
        (17, 1, 64, 0, (17, 0)),
    ],
)
def test_a_batch_of_few_photos_can_be_shared_and_cut(monkeypatch, count, devices, batch, part, wanted):
    monkeypatch.setattr(sharding, "local_mesh", lambda devices: None)
    monkeypatch.setattr(sharding, "size", lambda mesh: devices)
    assert index._batch(count, FOUND, indexing.config(batch_size=batch, micro_batch=part)) == wanted


def test_fewer_photos_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(sharding, "size", lambda mesh: 32)
    with pytest.raises(
        DataError, match="20 photos that can be read, fewer than the 32 devices that share a batch; set"
    ):
        index._batch(20, FOUND, indexing.config(batch_size=64))
