"""The golden values of tests/golden/make_backbones.py and make_cnns.py."""

import pathlib

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "backbones.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def golden_cnns() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "cnns.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def golden_folder() -> pathlib.Path:
    return GOLDEN
