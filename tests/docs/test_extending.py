"""The instructions of docs/extending.md run as printed, and each part is short."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.special
import sklearn.decomposition
import sklearn.metrics.pairwise

import cib_jax as cib
from cib_jax.baselines import BASELINES
from cib_jax.config import schema
from cib_jax.data import sources
from cib_jax.data.dataset import DataConfig
from configs import default
from tests.docs import pages


def run(part: str) -> dict:
    """Runs the code of a part and returns the names that it defines."""
    names: dict = {}
    for block in pages.code(pages.section("extending.md", part)):
        exec(compile(block, f"docs/extending.md, {part}", "exec"), names)
    return names


PARTS = ["A baseline", "An objective", "An optimizer and an augmentation", "A backbone", "A data set", "A config field"]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_under_forty_lines(part):
    assert len(pages.section("extending.md", part).strip().splitlines()) < 40


def test_the_baseline_turns_principal_components(monkeypatch):
    """Compares with scikit-learn's components: a rotation keeps inner products and mixes the components."""
    monkeypatch.setattr("cib_jax.baselines.BASELINES", rows := dict(BASELINES))
    run("A baseline")
    assert rows.keys() - BASELINES.keys() == {"pca_rotated"}
    features = np.random.default_rng(0).normal(size=(200, 24)) * np.linspace(1, 3, 24)
    encoder = rows["pca_rotated"].fit(features, 16, jax.random.key(0))
    logits = np.asarray(jax.jit(lambda encoder, x: encoder(x))(encoder, features.astype(np.float32)))
    components = sklearn.decomposition.PCA(16, svd_solver="full").fit_transform(features)
    np.testing.assert_allclose(logits @ logits.T, components @ components.T, atol=1e-3)
    # The variance of a bit is no longer that of its component.
    assert np.var(logits, axis=0).max() < np.var(components, axis=0).max()
    with pytest.raises(ValueError, match=r"^bits .*24"):
        rows["pca_rotated"].fit(features, 32, jax.random.key(0))


@pytest.fixture
def objectives(own_parts) -> dict:
    return run("An objective")


def logits(batch: int = 5, bits: int = 8) -> tuple[jax.Array, jax.Array]:
    first, second = np.random.default_rng(1).normal(size=(2, batch, bits)).astype(np.float32)
    return jnp.asarray(first), jnp.asarray(second)


def test_a_row_makes_an_objective(objectives):
    """Compares the loss with scikit-learn's cosines of the logits, plus β times SciPy's KL."""
    first, second = logits()
    loss, terms = cib.cib_loss(jax.random.key(0), first, second, objective="bottleneck_cl", temperature=0.5, beta=0.1)
    similarity = sklearn.metrics.pairwise.cosine_similarity(np.concatenate([first, second])) / 0.5
    positive = similarity[np.arange(10), (np.arange(10) + 5) % 10]
    np.fill_diagonal(similarity, -np.inf)
    contrast = np.mean(scipy.special.logsumexp(similarity, axis=1) - positive)
    p, q = scipy.special.expit(first), scipy.special.expit(second)
    kl = sum(scipy.special.rel_entr(a, b).sum() for a, b in ((p, q), (1 - p, 1 - q), (q, p), (1 - q, 1 - p))) / 2 / 5
    np.testing.assert_allclose(terms["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(loss, contrast + 0.1 * kl, rtol=1e-5)


def test_a_term_is_added_and_reported(objectives):
    first, second = logits()
    plain, _ = cib.cib_loss(jax.random.key(0), first, second)
    own = functools.partial(objectives["balanced"], balance_weight=2.0)
    loss, terms = cib.cib_loss(jax.random.key(0), first, second, objective=own)
    means = scipy.special.expit(np.concatenate([first, second])).mean(axis=0)
    np.testing.assert_allclose(terms["balance"], np.mean((means - 0.5) ** 2), rtol=1e-5)
    np.testing.assert_allclose(loss, plain + 2 * terms["balance"], rtol=1e-6)
    assert terms["loss"] == loss
    # Each bit is 1 for half of the batch: already balanced.
    assert float(objectives["balance"](jnp.array([[3.0, -1.0], [-3.0, 1.0]]))) < 1e-12


def test_a_backbone_becomes_an_encoder(own_parts, tmp_path):
    """Compares its features with a plain sum over each patch, with weights from a file."""
    run("A backbone")
    rng = np.random.default_rng(2)
    weight, bias = rng.normal(size=(64, 3, 8, 8)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    safetensors.numpy.save_file({"layer.weight": weight, "layer.bias": bias}, tmp_path / "patches.safetensors")
    loaded = cib.load_pretrained("patches", str(tmp_path / "patches.safetensors"))
    encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="patches", bits=8, backbone_params=loaded)
    assert sorted(params) == ["head"] and sorted(frozen) == ["backbone"]
    images = rng.normal(size=(2, 16, 24, 3)).astype(np.float32)
    patches = images.reshape(2, 2, 8, 3, 8, 3).transpose(0, 1, 3, 5, 2, 4).reshape(2, 6, -1)  # channel, row, column
    expected = np.maximum(patches @ weight.reshape(64, -1).T.astype(np.float64) + bias, 0).mean(1)
    np.testing.assert_allclose(encoder.features(params, frozen, jnp.asarray(images)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(cib.UserError, match="does not hold the weights of patches"):
        safetensors.numpy.save_file({"layer.weight": weight}, tmp_path / "half.safetensors")
        cib.load_pretrained("patches", str(tmp_path / "half.safetensors"))


def test_a_data_set_is_found_by_its_name(own_parts, tmp_path):
    run("A data set")
    pixels = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
    np.savez(tmp_path / "set.npz", images=pixels, labels=np.array([0, 1, 0, 1, 0, 1]))
    source = sources.load(DataConfig("arrays", str(tmp_path / "set.npz")))
    assert (source.test, source.classes) == (None, ["0", "1"])
    np.testing.assert_array_equal(source.train.take(np.array([4, 1])).images[0], pixels[4])
    with pytest.raises(cib.UserError, match=r"config.data.dir: 'nowhere.npz'"):
        sources.load(DataConfig("arrays", "nowhere.npz"))


def test_a_field_is_validated_by_its_rule(monkeypatch):
    monkeypatch.setattr(schema, "RULES", dict(schema.RULES))
    monkeypatch.setitem(schema.FIELDS, "margin", float)
    run("A config field")
    config = default.get_config()
    with config.unlocked():
        config.margin = 0.5
    schema.validate(config, around=True)
    config.margin = -1.0
    with pytest.raises(cib.UserError) as caught:
        schema.validate(config, around=True)
    assert caught.value.field == "config.margin"
