"""All forms of convolutions and pools against SciPy and loops in float64, and their gradients against each other."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from cib_jax.models import conv

TORCH = ((1, 1), (1, 1))
CASES = [(3, 1, "SAME"), (3, 2, "VALID"), (3, 2, TORCH), (5, 1, TORCH), (5, 2, "SAME")]
SIZE = (8, 9)  # one even, one odd side: they pad differently at stride 2


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def expected_depthwise(x: np.ndarray, kernel: np.ndarray, stride: int, padding) -> np.ndarray:
    """SciPy's correlation of each channel at stride 1, of which every `stride`-th value remains."""
    sides = [same_padding(n, k, stride) for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)]
    pads = {"SAME": sides, "VALID": [(0, 0), (0, 0)]}[padding] if isinstance(padding, str) else padding
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    channels = [
        [scipy.signal.correlate(image[..., c], kernel[..., 0, c], "valid", "direct") for image in x]
        for c in range(x.shape[-1])
    ]
    return np.moveaxis(np.asarray(channels), 0, -1)[:, ::stride, ::stride]


def same_padding(n: int, k: int, stride: int) -> tuple[int, int]:
    """TensorFlow's documented rule: by the remainder of n, and the odd row at the end."""
    total = max(k - stride, 0) if n % stride == 0 else max(k - n % stride, 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize(("k", "stride", "padding"), CASES)
def test_depthwise_matches_scipy(k, stride, padding):
    x, kernel, bias = draw(0, 2, *SIZE, 3), draw(1, k, k, 1, 3), draw(2, 3)
    expected = expected_depthwise(x, kernel, stride, padding)
    pads = conv.explicit_padding(SIZE, (k, k), stride, padding)

    @jax.jit
    def forms(x, kernel, bias):
        plain = conv.conv_plain(x, kernel, stride, pads) + bias
        shifts = conv.depthwise_by_shifts(x, kernel, stride, pads) + bias
        return conv.depthwise(x, kernel, bias, stride, padding), plain, shifts

    for ours in forms(*map(jnp.float32, (x, kernel, bias))):
        np.testing.assert_allclose(ours, expected + bias, atol=1e-5)


@pytest.mark.parametrize(("stride", "padding"), [(1, "SAME"), (2, "SAME"), (2, "VALID"), (2, TORCH)])
def test_conv_is_a_sum_of_depthwise_convolutions(stride, padding):
    x, kernel, bias = draw(0, 2, *SIZE, 3), draw(1, 3, 3, 3, 4), draw(2, 4)
    expected = np.stack([expected_depthwise(x, kernel[..., None, :, o], stride, padding).sum(-1) for o in range(4)], -1)
    pads = conv.explicit_padding(SIZE, (3, 3), stride, padding)

    @jax.jit
    def forms(x, kernel, bias):
        plain, columns = (form(x, kernel, stride, pads) for form in (conv.conv_plain, conv.conv_by_columns))
        return conv.conv(x, kernel, bias, stride, padding), plain + bias, columns + bias

    for ours in forms(*map(jnp.float32, (x, kernel, bias))):
        np.testing.assert_allclose(ours, expected + bias, atol=1e-5)


def test_pointwise_is_a_matrix_product():
    x, kernel, bias = draw(0, 2, 4, 5, 3), draw(1, 1, 1, 3, 6), draw(2, 6)
    expected = np.einsum("bhwi,io->bhwo", x, kernel[0, 0]) + bias
    single = jnp.float32(x), jnp.float32(kernel)
    np.testing.assert_allclose(conv.pointwise(*single, jnp.float32(bias)), expected, atol=1e-5)
    np.testing.assert_allclose(conv.conv_plain(*single, 1, conv.NO_PADS) + bias, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3)])
def test_max_pool_against_loops(size):
    x = draw(0, 2, *size, 3).astype(np.float32)
    expected = np.array(
        [
            [[image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((0, 1)) for j in range(size[1] // 2)]
             for i in range(size[0] // 2)]
            for image in x
        ]
    )  # fmt: skip
    for pool in map(jax.jit, (conv.max_pool_2x2, conv.max_pool_by_slices, conv.max_pool_plain)):
        np.testing.assert_array_equal(pool(jnp.asarray(x)), expected)
        half = pool(jnp.bfloat16(x))
        assert half.dtype == jnp.bfloat16
        np.testing.assert_array_equal(half, jnp.bfloat16(expected))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 2)])
def test_max_pool_3x3_against_loops(size):
    """All values are negative, so that zeros around the map would show."""
    x = -np.abs(draw(0, 2, *size, 3)).astype(np.float32)
    around = [[slice(max(2 * i - 1, 0), 2 * i + 2) for i in range(-(-n // 2))] for n in size]
    expected = np.array([[[image[rows, columns].max((0, 1)) for columns in around[1]] for rows in around[0]]
                         for image in x])  # fmt: skip
    plain = functools.partial(conv.max_pool_plain, window=3, pads=TORCH)
    for pool in map(jax.jit, (conv.max_pool_3x3, plain)):
        np.testing.assert_array_equal(pool(jnp.asarray(x)), expected)
        np.testing.assert_array_equal(pool(jnp.bfloat16(x)), jnp.bfloat16(expected))


PAIRS = {
    "conv of few inputs": (
        lambda x, k: conv.conv(x, k, jnp.zeros(4), 2),
        lambda x, k: conv.conv_plain(x, k, 2, ((0, 1), (0, 1))),
        (3, 3, 3, 4),
    ),
    "depthwise": (
        lambda x, k: conv.depthwise(x, k, jnp.zeros(3), 2, "SAME"),
        lambda x, k: conv.conv_plain(x, k, 2, ((1, 2), (1, 2))),
        (5, 5, 1, 3),
    ),
    "pointwise": (
        lambda x, k: conv.pointwise(x, k, jnp.zeros(4)),
        lambda x, k: conv.conv_plain(x, k, 1, conv.NO_PADS),
        (1, 1, 3, 4),
    ),
    "max_pool": (
        lambda x, k: conv.max_pool_2x2(x * k),
        lambda x, k: conv.max_pool_plain(x * k),
        (3,),
    ),
    "max_pool_3x3": (
        lambda x, k: conv.max_pool_3x3(x * k),
        lambda x, k: conv.max_pool_plain(x * k, 3, TORCH),
        (3,),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_of_both_forms_agree(name):
    """Under jit, and under vmap over a further axis."""
    chosen, plain, shape = PAIRS[name]
    x, kernel = jnp.float32(draw(0, 3, 2, 8, 8, 3)), jnp.float32(draw(1, *shape))

    def gradient(form):
        return jax.grad(lambda x, k: jnp.sum(jnp.sin(form(x, k))), argnums=(0, 1))

    ours, theirs = (jax.jit(jax.vmap(gradient(form), (0, None)))(x, kernel) for form in (chosen, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_the_platform_decides(name):
    """The CPU's program has no convolution and no window reduction; the one compiled for CUDA has one of them."""
    chosen, _, shape = PAIRS[name]
    traced = jax.jit(chosen).trace(jnp.ones((1, 8, 8, 3)), jnp.ones(shape))
    windowed = ("stablehlo.convolution", "stablehlo.reduce_window")
    cpu, cuda = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda"))
    assert not any(operation in cpu for operation in windowed)
    assert any(operation in cuda for operation in windowed)


@pytest.mark.parametrize(
    ("k", "stride", "padding"), [(3, 1, "SAME"), (5, 2, "SAME"), (3, 2, TORCH), (3, 3, "VALID"), (1, 2, "SAME")]
)
def test_gradients_of_the_form_for_loops_are_those_that_jax_derives(k, stride, padding):
    x, kernel = jnp.float32(draw(0, 2, *SIZE, 3)), jnp.float32(draw(1, k, k, 3, 4))
    pads = conv.explicit_padding(SIZE, (k, k), stride, padding)

    def gradients(form):
        return jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.sin(form(x, k, stride, pads))), argnums=(0, 1)))(x, kernel)

    for ours, theirs in zip(gradients(conv.conv_for_loops), gradients(conv.conv_plain), strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_loop_has_only_convolutions_that_a_cpu_is_quick_at():
    """Eigen's take images [batch, h, w, …] and kernels [kh, kw, …]; those that JAX derives are in another order."""

    def orders(form):
        def of_kernel(x, kernel):
            return jax.lax.map(lambda x: jax.grad(lambda k: jnp.sum(jnp.sin(form(x, k, 1, TORCH))))(kernel), x)

        program = jax.jit(of_kernel).lower(jnp.ones((2, 4, 8, 8, 3)), jnp.ones((3, 3, 3, 5))).compile().as_text()
        return set(re.findall(r" convolution\(.*dim_labels=(\S+?),", program))

    assert orders(conv.conv_for_loops) == {"b01f_01io->b01f"}
    assert orders(conv.conv_plain) > {"b01f_01io->b01f"}


WIDE = conv.WINOGRAD_CHANNELS


@pytest.mark.parametrize(
    ("shape", "stride", "is_plain"),
    [
        ((3, 3, WIDE, WIDE), 1, False),
        ((3, 3, WIDE, WIDE), 2, True),
        ((5, 5, WIDE, WIDE), 1, True),
        ((3, 3, WIDE - 1, WIDE), 1, True),
        ((3, 3, WIDE, WIDE - 1), 1, True),
    ],
)
def test_only_wide_3x3_convolutions_of_stride_1_become_winograd_s_on_a_cpu(shape, stride, is_plain):
    traced = jax.jit(lambda x, k: conv.conv(x, k, jnp.zeros(shape[-1]), stride)).trace(
        jnp.ones((1, 5, 6, shape[2])), jnp.ones(shape)
    )
    cpu, cuda = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda"))
    assert ("stablehlo.convolution" in cpu) == is_plain
    assert "stablehlo.convolution" in cuda


def test_wide_convolutions_agree_with_the_plain_form():
    x, kernel, bias = (jnp.float32(draw(i, *s)) for i, s in enumerate([(2, 5, 7, WIDE), (3, 3, WIDE, WIDE), (WIDE,)]))
    ours = jax.jit(functools.partial(conv.conv, padding=TORCH))(x, kernel, bias)
    np.testing.assert_allclose(ours, conv.conv_plain(x, kernel, 1, TORCH) + bias, atol=5e-4)


@pytest.mark.parametrize(("batch", "chunk"), [(12, 4), (7, 1), (5, 5), (1, 1)])
def test_chunks_give_what_the_whole_batch_gives(monkeypatch, batch, chunk):
    """At most five images of 4 × 6 pixels; the chunk is a divisor of the batch."""
    monkeypatch.setattr(conv, "CHUNK_PIXELS", 5 * 4 * 6)
    x, weight, seen = jnp.float32(draw(0, batch, 4, 6, 3)), jnp.float32(draw(1, 3)), []

    def function(x, weight):
        seen.append(len(x))
        return jnp.sum(jnp.sin(x * weight), axis=(1, 2))

    def loss(form):
        return jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(form(x, w) ** 2), argnums=(0, 1)))

    ours = loss(lambda x, w: conv.in_chunks(lambda x: function(x, w), x))(x, weight)
    assert set(seen) == {batch, chunk}
    theirs = loss(function)(x, weight)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_an_accelerator_takes_the_whole_batch(monkeypatch):
    monkeypatch.setattr(conv, "CHUNK_PIXELS", 1)
    traced = jax.jit(lambda x: conv.in_chunks(jnp.sin, x)).trace(jnp.ones((4, 2, 2, 3)))
    cpu, cuda = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda"))
    assert "stablehlo.while" in cpu
    assert "stablehlo.while" not in cuda


def test_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="HALF"):
        conv.explicit_padding((8, 8), (3, 3), 1, "HALF")


def winograd(pads=TORCH):
    return jax.jit(functools.partial(conv.winograd, pads=pads))


def correlate(x: np.ndarray, kernel: np.ndarray, pads) -> np.ndarray:
    """Each image with each output's kernel, which spans all channels."""
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    maps = [
        [scipy.signal.correlate(image, kernel[..., o], "valid", "direct")[..., 0] for o in range(kernel.shape[-1])]
        for image in x
    ]
    return np.moveaxis(np.asarray(maps), 1, -1)


def test_transforms_give_a_correlation():
    """Y = Aᵀ [(G g) ⊙ (Bᵀ d)], equation 6 of the paper, in float64."""
    output, weights, data = map(np.array, (conv.OF_OUTPUT, conv.OF_KERNEL, conv.OF_DATA))
    d, g = draw(0, 4), draw(1, 3)
    np.testing.assert_allclose(output @ ((weights @ g) * (data @ d)), np.correlate(d, g, "valid"), atol=1e-13)


# Sizes that tiles fill in part; the last has a single output per row.
SIZES = [(11, 4, ((0, 1), (2, 0))), (5, 6, ((1, 1), (1, 1))), (1, 2, ((2, 0), (0, 1)))]


@pytest.mark.parametrize(("height", "width", "pads"), SIZES)
def test_winograd_matches_scipy_at_any_size(height, width, pads):
    x, kernel = draw(0, 2, height, width, 3), draw(1, 3, 3, 3, 2)
    ours = winograd(pads)(jnp.float32(x), jnp.float32(kernel))
    expected = correlate(x, kernel, pads)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=5e-5)


def test_winograd_s_rounding_errors_stay_small_over_many_channels():
    """Relative to the largest output, with weights as in a network."""
    x, kernel = np.maximum(draw(0, 1, 12, 12, 256), 0), draw(1, 3, 3, 256, 4) / 48
    ours = winograd()(jnp.float32(x), jnp.float32(kernel))
    expected = correlate(x, kernel, ((1, 1), (1, 1)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_winograd_s_gradients_equal_those_of_the_plain_form():
    """Under jit, and under vmap over a further axis."""
    x, kernel, pads = jnp.float32(draw(0, 2, 1, 5, 6, 3)), jnp.float32(draw(1, 3, 3, 3, 4)), ((1, 1), (1, 1))

    def gradient(form):
        return jax.grad(lambda x, k: jnp.sum(jnp.sin(form(x, k))), argnums=(0, 1))

    forms = (
        functools.partial(conv.winograd, pads=pads),
        functools.partial(conv.conv_plain, stride=1, pads=pads),
    )
    ours, theirs = (jax.jit(jax.vmap(gradient(form), (0, None)))(x, kernel) for form in forms)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_winograd_s_bfloat16_stays_bfloat16():
    x, kernel = draw(0, 1, 6, 6, 64), draw(1, 3, 3, 64, 4) / 24
    ours = winograd()(jnp.bfloat16(x), jnp.bfloat16(kernel))
    assert ours.dtype == jnp.bfloat16
    expected = correlate(x, kernel, ((1, 1), (1, 1)))
    error = np.asarray(ours, np.float64) - expected
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(expected)
