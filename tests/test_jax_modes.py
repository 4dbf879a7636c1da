"""JAX's other modes: double precision, strict promotion of types and of ranks, donated states, half precision."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cib_jax as cib
from cib_jax.augment.features import standard

GENERATOR = np.random.default_rng(0)
KEY = jax.random.key(0)
IMAGES = GENERATOR.integers(0, 256, (16, 12, 12, 3), np.uint8)
FEATURES = GENERATOR.normal(size=(16, 6)).astype(np.float32)
LOGITS = GENERATOR.normal(size=(2, 16, 12)).astype(np.float32)
COORDINATES = GENERATOR.random((16, 4), np.float32)


@contextlib.contextmanager
def strict():
    """No implicit conversion of types, and no broadcasting over fewer axes."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


MODES = {
    "double precision": lambda: jax.enable_x64(True),
    "strict": strict,
}


def results():
    """Returns the results of the pure functions, and the logits of a trained hasher."""
    logits = jnp.asarray(LOGITS)
    found = {"resized": jax.jit(functools.partial(cib.resize_and_normalize, image_size=8))(IMAGES)}
    loss = functools.partial(cib.cib_loss, KEY, objective="diffusion", coordinates=jnp.asarray(COORDINATES))
    found["gradient"] = jax.jit(jax.grad(lambda a, b: loss(a, b)[0]))(*logits)
    found["loss"], _ = jax.jit(cib.cib_loss)(KEY, *logits)
    found["codes"] = cib.unpack_bits(cib.pack_bits(logits), 12)
    settings = {"bits": 12, "hidden": 8, "epochs": 1, "batch_size": 8}
    found["hashed"] = cib.fit(FEATURES, backbone="none", augment="noise", **settings).logits(FEATURES)
    return found


@pytest.fixture(scope="module")
def usual():
    return results()


@pytest.mark.parametrize("mode", MODES)
def test_the_results_are_the_usual_ones(usual, mode):
    with MODES[mode]():
        found = results()
        views = jax.jit(functools.partial(cib.two_views, image_size=8))(KEY, IMAGES)
    for name, expected in usual.items():
        assert found[name].dtype == np.float32, name
        # Other programs, with other roundings, which Adam enlarges.
        atol = 0.02 if name == "hashed" else 1e-5
        np.testing.assert_allclose(found[name], expected, atol=atol, err_msg=name)
    for view in views:
        assert view.dtype == np.float32 and np.abs(view).max() <= 1.0 + 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rare_bits_are_drawn_as_often_as_they_should_be(dtype):
    """bfloat16 has so few numbers near 0 that bits drawn in it come three times too often at a logit of −6."""
    drawn = cib.sample_codes(KEY, jnp.full((1000, 400), -6, dtype)) > 0
    chance = 1 / (1 + np.exp(6))
    # Five standard deviations of 400,000 draws.
    assert abs(float(drawn.mean()) - chance) < 5 * np.sqrt(chance / 400_000)


def test_a_state_that_holds_the_parameters_twice_can_be_donated():
    """SAM's optimizer keeps the parameters themselves."""
    encoder, params, frozen = cib.create_encoder(KEY, backbone="none", bits=12, hidden=8, standard=standard([FEATURES]))
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    optimizer = optax.contrib.sam(optax.sgd(0.1), adversary, sync_period=2)
    step = functools.partial(cib.train_step, encoder=encoder, optimizer=optimizer, augment="noise")
    jitted, state = jax.jit(step, donate_argnums=0), cib.create_train_state(params, optimizer)
    for number in range(3):
        state, _ = jitted(state, frozen, FEATURES, jax.random.fold_in(KEY, number))
    assert int(state.step) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


class Tensor:
    """An array of another library, such as PyTorch: NumPy can read it, but it is not NumPy's."""

    def __init__(self, array, readable=True):
        self.array, self.readable, self.shape = array, readable, array.shape
        self.dtype = f"library.{array.dtype}"

    def __len__(self):
        return len(self.array)

    def __array__(self, dtype=None, copy=None):
        if not self.readable:
            raise TypeError("unsupported ScalarType BFloat16")
        return self.array if dtype is None else self.array.astype(dtype)


@pytest.fixture(scope="module")
def hasher():
    return cib.fit(FEATURES, backbone="none", augment="noise", bits=12, hidden=8, epochs=1, batch_size=8)


@pytest.mark.usefixtures("without_shape_checks")
def test_arrays_of_any_library_are_hashed(hasher):
    """NumPy's whole numbers are taken as settings, too."""
    expected = hasher.encode(FEATURES)
    assert expected.shape == (16, 2) and not (expected[:, 1] & 0x0F).any()
    np.testing.assert_array_equal(hasher.encode(Tensor(FEATURES)), expected)
    halves = jnp.asarray(FEATURES, jnp.bfloat16)
    for form in (halves, np.asarray(halves)):
        np.testing.assert_array_equal(hasher.encode(form), hasher.encode(np.asarray(halves, np.float32)))
        trained = cib.fit(form, backbone="none", augment="noise", bits=np.int64(12), hidden=8, epochs=1, batch_size=8)
        assert trained.encode(form).shape == (16, 2)
    for refused in (lambda: hasher.encode(Tensor(FEATURES, readable=False)), lambda: cib.fit(Tensor(IMAGES, False))):
        with pytest.raises(cib.UserError) as error:
            refused()
        assert error.value.field == "images"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused(hasher, value):
    features = FEATURES.copy()
    features[11, 2] = value
    for function in (hasher.encode, hasher.logits):
        with pytest.raises(cib.UserError, match="row 11") as error:
            function(features)
        assert error.value.field == "images"


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", -1),
        ("beta", "much"),
        ("bits", 8.0),
        ("bits", 0),
        ("bits", True),
        ("hidden", 0),
        ("epochs", 1.5),
        ("batch_size", 8.0),
        ("views", True),
        ("temperature", 0),
    ],
)
def test_settings_out_of_range_or_of_another_type_are_refused(name, value):
    settings = {"bits": 12, "hidden": 8, "epochs": 1, "batch_size": 8} | {name: value}
    with pytest.raises(cib.UserError) as error:
        cib.fit(FEATURES, backbone="none", augment="noise", **settings)
    assert error.value.field == name


@pytest.mark.parametrize("k", [True, 0, 17])
def test_a_depth_that_is_not_a_whole_number_is_refused(k):
    codes, labels = GENERATOR.integers(0, 256, (16, 2), np.uint8), GENERATOR.integers(0, 3, 16)
    with pytest.raises(cib.UserError) as error:
        cib.mean_average_precision(codes, codes, labels, labels, k=k)
    assert error.value.field == "k"


def test_a_row_of_zeros_has_a_gradient_of_the_size_of_the_others():
    logits = jnp.asarray(LOGITS).at[0, 3].set(0.0)
    with jax.debug_nans(True):
        gradient = jax.jit(jax.grad(lambda a, b: cib.cib_loss(KEY, a, b, objective="naive_cl")[0]))(*logits)
    sizes = np.linalg.norm(np.asarray(gradient), axis=1)
    assert 0 < sizes[3] < 100 * np.median(sizes)
