"""Images read as they are needed, by another program than those on the device: the same bits, as users compile both."""

import jax
import numpy as np
import pytest
import rich.console

from cib_jax.hasher import Hasher
from cib_jax.jobs.train import train
from tests import small

pytestmark = pytest.mark.usefixtures("compiled_as_for_users")


def test_streamed_images_train_to_the_same_bits_as_resident_ones(tmp_path):
    ends = []
    for name, megabytes in (("resident", small.config().data.resident_mb), ("streamed", 0)):
        train(small.config(data__resident_mb=megabytes), tmp_path / name, console=rich.console.Console(quiet=True))
        ends.append(jax.tree.leaves(Hasher.load(tmp_path / name).params))
    assert all(np.array_equal(*pair) for pair in zip(*ends, strict=True))
