"""DINOv2 against PyTorch's `transformers`, with the same random weights on both sides."""

import numpy as np
import pytest

from cib_jax.models import dinov2, registry
from cib_jax.models.state_dict import MismatchError
from tests.golden import transformer_inputs
from tests.models.conftest import compiled, same_shapes

NAMES = ("dinov2_small", "dinov2_base", "dinov2_small_registers", "dinov2_base_registers")
# The first is quick: few channels, few pixels. At 518 px, the size of training, positions are not interpolated.
SIZES = [
    ("dinov2_small_registers", (112, 168)),
    *(
        pytest.param(name, size, marks=pytest.mark.slow)
        for name in NAMES
        for size in transformer_inputs.SIZES[name]
        if (name, size) != ("dinov2_small_registers", (112, 168))
    ),
]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_features_match_pytorch(golden_transformers, name, size):
    backbone = registry.get(name)
    state = backbone.convert(transformer_inputs.checkpoint(golden_transformers, name))
    ours = compiled(backbone)(state, transformer_inputs.images(*size))
    np.testing.assert_allclose(ours, golden_transformers[f"{name}_{size[0]}_{size[1]}"], rtol=0, atol=1e-4)


def zeros(golden, name: str) -> dict[str, np.ndarray]:
    shapes = transformer_inputs.shapes_in_file(golden, name)
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_published_names_and_shapes_become_the_module_s(golden_transformers, name, shapes_of):
    assert same_shapes(registry.get(name).convert(zeros(golden_transformers, name)), shapes_of(name)[1])


def test_another_network_is_refused(golden_transformers):
    small = zeros(golden_transformers, "dinov2_small")
    small["stray"] = np.zeros(3, np.float32)
    del small["layernorm.bias"]
    with pytest.raises(MismatchError, match=r"^missing: layernorm.bias; unknown: stray$"):
        dinov2.convert(small, dinov2.SMALL)
    base = zeros(golden_transformers, "dinov2_base")
    with pytest.raises(MismatchError, match=r"embeddings.patch.* \[768, 3, 14, 14\] \(needed \[384,"):
        dinov2.convert(base, dinov2.SMALL)
    with pytest.raises(MismatchError, match=r"^missing: embeddings.register_tokens$"):
        dinov2.convert(base, dinov2.BASE_REGISTERS)
    with pytest.raises(MismatchError, match=r"^unknown: embeddings.register_tokens$"):
        dinov2.convert(zeros(golden_transformers, "dinov2_base_registers"), dinov2.BASE)
