"""State-dicts: the comparison of shapes, and batch norms in convolutions against the formula in float64."""

import ml_dtypes
import numpy as np
import pytest

from cib_jax.models import state_dict
from cib_jax.models.state_dict import MismatchError, NormedConvolution

NEEDED = {"a.weight": (2, 3), "a.bias": (2,), "b": (4,)}


def arrays(**changes):
    made = {name: np.zeros(shape, np.float32) for name, shape in NEEDED.items()} | changes
    return {name: array for name, array in made.items() if array is not None}


def test_needed_and_extra_tensors_are_accepted():
    state_dict.validate_shapes(arrays(b=np.zeros(4, ml_dtypes.bfloat16), c=np.int64(3)), NEEDED, {"c", "d"})


def test_every_fault_is_named():
    with pytest.raises(MismatchError) as caught:
        state_dict.validate_shapes(
            arrays(**{"a.weight": None, "a.bias": np.zeros(3, np.float32), "b": np.zeros(4, int), "stray": np.ones(1)}),
            NEEDED,
            set(),
        )
    for part in ("missing: a.weight", "unknown: stray", "a.bias [3] (needed [2])", "b (int64)"):
        assert part in str(caught.value)


def test_long_lists_are_cut():
    with pytest.raises(MismatchError, match=r"s0, s1, s2 and 6 more"):
        state_dict.validate_shapes(arrays(**{f"s{i}": np.ones(1) for i in range(9)}), NEEDED, set())


def test_a_folded_layer_is_the_convolution_and_its_batch_norm():
    """At one pixel, where a 1×1 convolution is a matrix product."""
    layer = NormedConvolution("conv", "norm", (5, 4, 1, 1))
    rng = np.random.default_rng(0)
    tensors = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in layer.torch_shapes.items()}
    assert tensors.keys() == {"conv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
    folded = state_dict.fold_batch_norms(tensors, [layer], 1e-3)["conv"]
    exact = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = rng.normal(size=4)
    y = exact["conv.weight"][:, :, 0, 0] @ x
    normal = (y - exact["norm.running_mean"]) / np.sqrt(exact["norm.running_var"] + 1e-3)
    expected = normal * exact["norm.weight"] + exact["norm.bias"]
    np.testing.assert_allclose(x @ folded["kernel"][0, 0] + folded["bias"], expected, rtol=1e-5)
    assert {folded[part].dtype for part in folded} == {np.dtype(np.float32)}
    assert folded["kernel"].shape == (1, 1, 4, 5)
    assert state_dict.counters([layer]) == {"norm.num_batches_tracked"}
