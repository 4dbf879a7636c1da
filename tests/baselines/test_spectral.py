"""Spectral hashing against the closed form on a box and against a plain loop over the published algorithm."""

import jax
import numpy as np
import pytest
import sklearn.decomposition
from hypothesis import given
from hypothesis import strategies as st

from cib_jax.baselines import spectral


def published_waves(extent, bits):
    """The modes as the paper's code lists them: axis by axis up to a highest mode, sorted by squared frequency."""
    highest = np.ceil((bits + 1) * extent / extent.max()).astype(int)
    modes = [(axis, k) for axis in range(len(extent)) for k in range(1, highest[axis])]
    return sorted(modes, key=lambda mode: (np.pi * mode[1] / extent[mode[0]]) ** 2)[:bits]


def test_on_a_box_of_3_by_1_waves_go_along_the_longer_side_first():
    axis, wave = spectral.lowest_waves(np.array([3.0, 1.01]), 5)
    # Frequencies k/3 and k/1.01: 0.33 0.67 0.99 1 1.33.
    assert list(zip(axis.tolist(), wave.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 1), (0, 3), (0, 4)]


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 1000))
def test_waves_are_those_of_the_published_list(axes, bits, seed):
    extent = np.sort(np.random.default_rng(seed).uniform(0.1, 3, axes))[::-1]
    found = list(zip(*(part.tolist() for part in spectral.lowest_waves(extent, bits)), strict=True))
    assert found == published_waves(extent, bits)


def test_logits_are_cosines_along_scikit_learns_axes():
    generator = np.random.default_rng(2)
    features = (generator.uniform(-1, 1, size=(500, 5)) * [8, 4, 2, 1, 0.5] + 3).astype(np.float32)
    logits = np.asarray(spectral.fit(features, 8, jax.random.key(0))(features))
    along = sklearn.decomposition.PCA(5).fit_transform(features.astype(np.float64))
    low, extent = along.min(axis=0), np.ptp(along, axis=0)
    for bit, (axis, k) in enumerate(published_waves(extent, 8)):
        wave = np.cos(k * np.pi * (along[:, axis] - low[axis]) / extent[axis])
        # The axis may be flipped there: cos(kπ(1 − x)) = ±cos(kπx).
        np.testing.assert_allclose(np.abs(logits[:, bit]), np.abs(wave), atol=1e-4)


def test_flat_axes_carry_no_wave_and_a_single_point_is_refused():
    flat = np.zeros((50, 4), np.float32)
    flat[:, 0] = np.arange(50)
    logits = np.asarray(spectral.fit(flat, 8, jax.random.key(0))(flat))
    assert np.isfinite(logits).all() and len(np.unique(logits > 0, axis=0)) > 8
    with pytest.raises(ValueError, match="all rows are equal"):
        spectral.fit(np.ones((50, 4), np.float32), 8, jax.random.key(0))
