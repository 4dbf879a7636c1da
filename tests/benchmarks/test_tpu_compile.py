"""Programs compiled for TPUs: that they compile and fit, and what is computed of their figures."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from benchmarks import tpu_compile
from benchmarks.tpu_compile import CHIPS, PROGRAMS, Chip, Figures, Place, Program


def test_the_slowest_of_three_bounds_a_step():
    """A step of 64 images on 4 chips: 2 s of products, 5 s of memory, 1 s of links."""
    chip = Chip(flops=10.0, memory=100.0, bandwidth=2.0, links=30.0)
    figures = Figures(64, 4, 0.0, 50, flops=20.0, bytes=10.0, sent={"all-reduce": 20, "all-gather": 10})
    assert figures.times(chip) == {"matrix": 2.0, "memory": 5.0, "links": 1.0}
    assert figures.rate(chip) == 64 / 4 / 5


def test_the_figures_of_a_product_are_those_of_its_shapes():
    place = Place(tuple(jax.devices("cpu")[:1]))
    shapes = place.array(64, 128), place.array(128, 32)
    _, figures = tpu_compile.compiled(Program(jax.jit(jnp.matmul), shapes, 64), 1, "cpu")
    assert figures.flops == 2 * 64 * 128 * 32
    assert figures.bytes == 4 * (64 * 128 + 128 * 32 + 64 * 32)
    assert figures.memory >= figures.bytes
    assert figures.sent == {}


@pytest.mark.parametrize(
    ("name", "options"),
    [("convnet", {}), ("stored-views", {"steps": 64}), ("rank", {}), ("metrics", {}), ("contrast", {})],
)
def test_programs_are_lowered_for_gpus(name, options):
    program = PROGRAMS[name](Place(tuple(jax.devices("cpu")[:1])), 8, **options)
    assert program.function.trace(*program.arguments).lower(lowering_platforms=("cuda",)).cost_analysis()["flops"] > 0


def test_a_program_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        tpu_compile.main(["paper", "nothing"])
    assert "no such program: nothing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="install the extra tpu")
@pytest.mark.parametrize("name", ["paper", "efficientnet", "bank", "encode-vgg16", "rank"])
def test_programs_compile_for_tpus_and_fit(name, monkeypatch):
    """On eight chips; the paper's step is bound by its products, of which views are a small part."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    place, chip = tpu_compile.slice_of("v5e", 8), CHIPS["v5e"]
    _, figures = tpu_compile.compiled(PROGRAMS[name](place, 64), 8)
    assert figures.memory < chip.memory
    if name == "paper":
        times = figures.times(chip)
        assert times["matrix"] > 0.6 * max(times.values())
