"""What several processes exchange and agree on, in three processes on loopback; and how work is shared."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cib_jax as cib
from cib_jax.distributed import initialize, multihost
from cib_jax.distributed.multihost import Place
from cib_jax.training import input_pipeline
from tests.end_to_end.processes import ROOT, free_port

COUNT = 3

PROGRAM = """
import json, sys
import jax, numpy as np
import cib_jax as cib
from cib_jax.distributed import initialize, multihost, sharding
from cib_jax.errors import Refusal
from cib_jax.training import view_bank

number, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
rendezvous.join(f"127.0.0.1:{port}", number, count)
told = {"several": processes.several(), "first": processes.first()}
rows = np.arange(number * 2, dtype=np.float64)[:, None] / 3 + number  # 0, 2 and 4 rows; no float32 holds them
told["gathered"] = [part.tolist() for part in processes.gather(rows)]
told["nothing"] = [part.shape for part in processes.gather(rows[:0])]
told["texts"] = processes.gather_texts("ä" * number)
told["from first"] = processes.from_first(f"said by {number}")
told["all"] = [processes.all_of(True), processes.all_of(number != 1)]
try:
    with processes.agreed():
        if number == 1:
            raise Refusal("one of them")
except processes.SharedRefusal as error:
    told["refused"] = str(error)
try:
    processes.check_alike({"--seed": 3, "--bits": 16 + number // 2})
except processes.SharedRefusal as error:
    told["unlike"] = str(error)
processes.check_alike({"--seed": 3})
order = folder + "/order"
def note():
    with open(order, "a") as file:
        file.write(str(number))
    return open(order).read()[0]
told["first saw"] = processes.first_then_others(note)

mesh = parallel.mesh(0, 12)
here = parallel.rows_here(mesh, 12)
told["rows"] = here.tolist()
batch = np.arange(12, dtype=np.float32)[:, None] * np.ones(2, np.float32)
total = jax.jit(lambda x: (x * np.arange(1, 13)[None, :, None]).sum())(parallel.batch_of(batch[here], here, mesh, 12))
told["weighted"] = float(total)

encoder, params, _ = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=8, image_size=8, hidden=8)
images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
asked = []
def batches(start, stop):
    asked.append((start, stop))
    return (images[at : min(at + 2, stop)] for at in range(start, stop, 2))
bank = view_bank.build(jax.random.key(1), encoder, {"backbone": params["backbone"]}, batches, count=11,
                       batch_size=2, views=2,
                       family="digits", over=parallel.local_mesh())
told["asked"] = asked
np.save(f"{folder}/bank-{number}.npy", bank)
with open(f"{folder}/told-{number}.json", "w") as file:
    json.dump(told, file)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of three processes, with two devices each, found."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(number), str(COUNT), str(port), str(folder)], cwd=ROOT, env=environment
        )
        for number in range(COUNT)
    ]
    assert [process.wait(timeout=200) for process in started] == [0] * COUNT
    found = [json.loads((folder / f"told-{number}.json").read_text()) for number in range(COUNT)]
    for number, one in enumerate(found):
        one["bank"] = np.load(folder / f"bank-{number}.npy")
        one["order"] = (folder / "order").read_text()
    return found


def test_everyone_gets_everyones_rows_to_the_last_bit(told):
    rows = [(np.arange(number * 2)[:, None] / 3 + number).tolist() for number in range(COUNT)]
    for one in told:
        assert one["several"] and one["gathered"] == rows
        assert one["nothing"] == [[0, 1]] * COUNT
        assert one["texts"] == ["", "ä", "ää"]
        assert one["from first"] == "said by 0"
        assert one["all"] == [True, False]
    assert [one["first"] for one in told] == [True, False, False]


def test_what_one_refuses_all_refuse(told):
    assert [one["refused"] for one in told] == ["one of them"] * COUNT


def test_what_one_was_told_otherwise_is_refused_in_all(told):
    words = "--bits: process 2 was started with 17, the first one with 16; give all the same, but for --process"
    assert [one["unlike"] for one in told] == [words] * COUNT


def test_the_first_goes_first(told):
    assert [one["first saw"] for one in told] == ["0"] * COUNT
    assert sorted(told[0]["order"]) == ["0", "1", "2"] and told[0]["order"][0] == "0"


def test_a_batch_is_made_of_what_each_process_holds(told):
    assert sorted(row for one in told for row in one["rows"]) == list(range(12))
    assert all(len(one["rows"]) == 4 for one in told)
    expected = sum(2.0 * row * (row + 1) for row in range(12))
    assert [one["weighted"] for one in told] == [expected] * COUNT


def test_a_bank_is_computed_once_each_process_its_share(told):
    encoder, params, _ = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=8, image_size=8, hidden=8)
    images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    alone = input_pipeline.build_view_bank(
        jax.random.key(1),
        encoder,
        {"backbone": params["backbone"]},
        lambda start, stop: (images[at : min(at + 2, stop)] for at in range(start, stop, 2)),
        count=11,
        batch_size=2,
        views=2,
        family="digits",
    )
    for one in told:
        np.testing.assert_allclose(one["bank"], alone, rtol=1e-3, atol=1e-5)
        assert np.array_equal(one["bank"], told[0]["bank"])
    assert [one["asked"] for one in told] == [[[0, 4]] * 2, [[4, 8]] * 2, [[8, 11]] * 2]


@given(count=st.integers(0, 10_000), processes_=st.integers(1, 300))
def test_shares_are_the_whole_in_order_and_differ_by_one_at_most(count, processes_):
    shares = [multihost.share_of(count, Place(number, processes_)) for number in range(processes_)]
    assert [row for share in shares for row in range(share.start, share.stop)] == list(range(count))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(parts=st.integers(0, 500), count=st.integers(1, 64))
def test_every_part_is_one_processs(parts, count):
    taken = [part for process in range(count) for part in multihost.parts_of(parts, Place(process, count))]
    assert sorted(taken) == list(range(parts))
    sizes = [len(multihost.parts_of(parts, Place(process, count))) for process in range(count)]
    assert max(sizes) - min(sizes) <= 1


def test_alone_a_process_is_the_first_of_one():
    initialize.initialize()
    assert multihost.is_first_process() and not multihost.is_distributed() and multihost.share(5) == slice(0, 5)
    assert multihost.gather_texts("mine") == ["mine"] and multihost.broadcast_text("mine") == "mine"
