"""Bytes between devices, counted in compiled programs whose communication is known, and in other backends' forms."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import collectives
from tests.end_to_end.processes import ROOT

# One process with 4 devices, since their number is fixed when JAX starts.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
from benchmarks import collectives

mesh = Mesh(jax.devices(), ("d",))

def read(body, *shapes, dtype=jnp.float32):
    spread = jax.shard_map(body, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    text = jax.jit(spread).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).compile().as_text()
    return [[one.kind, one.bytes, one.devices, one.times, one.sent] for one in collectives.read(text)]

def gathered(x):
    return jax.lax.all_gather(x, "d", tiled=True)

def looped(x):
    return jax.lax.scan(lambda x, _: (x + jax.lax.psum(x, "d"), None), x, None, length=5)[0]

def nested(x):
    inner = lambda x, _: (jax.lax.ppermute(x, "d", [(i, (i + 1) % 4) for i in range(4)]) + 1, None)
    return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0], None), x, None, length=7)[0]

json.dump({
    "all-gather": read(gathered, (8, 6)),
    "half": read(gathered, (8, 6), dtype=jnp.bfloat16),
    "all-reduce": read(lambda x: jax.lax.psum(x, "d"), (8, 6)),
    "reduce-scatter": read(lambda x: jax.lax.psum_scatter(x, "d", tiled=True), (32, 6)),
    "all-to-all": read(lambda x: jax.lax.all_to_all(x, "d", 0, 0, tiled=True), (32, 6)),
    "looped": read(looped, (8, 6)),
    "nested": read(nested, (8, 6)),
    "alone": read(lambda x: x + 1, (8, 6)),
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def counted():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_bytes_and_runs_are_those_of_the_closed_form(counted):
    """Whole arrays x of 8 × 6 float32: 192 bytes, 48 on each of 4 devices."""
    assert counted["all-gather"] == [["all-gather", 192, 4, 1, 144]]
    assert counted["half"] in ([["all-gather", 96, 4, 1, 72]], [["all-gather", 192, 4, 1, 144]])  # a CPU may widen it
    assert counted["all-reduce"] == [["all-reduce", 48, 4, 1, 72]]
    assert counted["reduce-scatter"] == [["reduce-scatter", 48, 4, 1, 144]]
    assert [one[0] for one in counted["all-to-all"]] == ["all-to-all"] and counted["all-to-all"][0][1] == 192
    assert counted["alone"] == []


def test_a_collective_in_a_loop_counts_as_often_as_it_runs(counted):
    assert counted["looped"] == [["all-reduce", 48, 4, 5, 72]]
    assert counted["nested"] == [["collective-permute", 48, 4, 21, 48]]


STARTED = """
HloModule step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(f32[] %a, f32[] %b)
}

ENTRY %main (x: f32[16,64], y: f32[10]) -> (f32[64,64], f32[10]) {
  %s = (f32[16,64]{1,0}, f32[64,64]{1,0}) all-gather-start(f32[16,64] %x), replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[64,64]{1,0} all-gather-done((f32[16,64], f32[64,64]) %s)
  %t = ((f32[4]{0}, bf16[2]{0}), (f32[16]{0}, bf16[8]{0})) all-gather-start(%a, %b), replica_groups={{0,1,2,3}}
  %r = (f32[10]{0}, f32[]) all-reduce-start(f32[10] %y, f32[] %z), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %e = (f32[10]{0}, f32[]) all-reduce-done((f32[10], f32[]) %r)
  %p = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,1},{1,0}}
  ROOT %o = (f32[64,64], f32[10]) tuple(%d, %e)
}
"""


def test_asynchronous_collectives_count_once():
    """The form that TPUs and GPUs compile to."""
    found = [(one.kind, one.bytes, one.devices) for one in collectives.read(STARTED)]
    assert found == [
        ("all-gather", 64 * 64 * 4, 4),
        ("all-gather", 16 * 4 + 8 * 2, 4),
        ("all-reduce", 44, 2),
        ("collective-permute", 32, 2),
    ]


def test_a_collective_that_cannot_be_counted_is_an_error():
    loop = "%body (x: f32[2]) -> f32[2] {\n ROOT %r = f32[2] all-reduce(%x), replica_groups={{0,1}}\n}\n"
    entry = "ENTRY %main (x: f32[2]) -> f32[2] {\n ROOT %w = f32[2] while(%x), condition=%c, body=%body\n}\n"
    condition = "%c (x: f32[2]) -> pred[] {\n ROOT %t = pred[] constant(true)\n}\n"
    with pytest.raises(ValueError, match="all-reduce"):
        collectives.read(loop + condition + entry)
    with pytest.raises(ValueError, match="f4e2m1fn"):
        collectives.size("f4e2m1fn[8]")
