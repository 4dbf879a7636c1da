"""Exchange, shared errors and divided work in two processes on loopback; shares of work."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import multihost_utils

import cib_jax as cib
from cib_jax.distributed import initialize, multihost
from cib_jax.distributed.multihost import ProcessIndex
from cib_jax.training import input_pipeline
from cib_jax.training.input_pipeline import ImageBatches
from tests.end_to_end.processes import ROOT, free_port

COUNT = 2

PROGRAM = """
import json, sys
import jax, numpy as np
import cib_jax as cib
from cib_jax.distributed import initialize, multihost, sharding
from cib_jax.errors import SharedRefusal, UserError
from cib_jax.training import input_pipeline
from cib_jax.training.input_pipeline import ImageBatches

number, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
initialize.initialize(f"127.0.0.1:{port}", number, count)
found = {"distributed": multihost.is_distributed(), "first": multihost.is_first_process()}
rows = np.arange(number * 2, dtype=np.float64)[:, None] / 3 + number  # 0 and 2 rows; float32 cannot represent them
found["gathered"] = [part.tolist() for part in multihost.gather(rows)]
found["nothing"] = [part.shape for part in multihost.gather(rows[:0])]
found["texts"] = multihost.gather_texts("ä" * number)
found["broadcast"] = multihost.broadcast_text(f"said by {number}")
found["all"] = [multihost.all_processes(True), multihost.all_processes(number != 1)]
try:
    with multihost.shared_errors():
        if number == 1:
            raise UserError("one of them")
except SharedRefusal as error:
    found["shared"] = str(error)
try:
    multihost.validate_alike({"--seed": 3, "--bits": 16 + number})
except SharedRefusal as error:
    found["differing"] = str(error)
multihost.validate_alike({"--seed": 3})
order = folder + "/order"
def note():
    with open(order, "a") as file:
        file.write(str(number))
    return open(order).read()[0]
found["first saw"] = multihost.run_first_then_others(note)

mesh = sharding.make_mesh(0, 12)
here = sharding.local_rows(mesh, 12)
found["rows"] = here.tolist()
batch = np.arange(12, dtype=np.float32)[:, None] * np.ones(2, np.float32)
chunk = sharding.global_batch(batch[here], here, mesh, 12)
found["weighted"] = float(jax.jit(lambda x: (x * np.arange(1, 13)[None, :, None]).sum())(chunk))

encoder, params, _ = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=8, image_size=8, hidden=8)
pixels = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
asked = []
def batches(start, stop):
    asked.append((start, stop))
    return (pixels[at : min(at + 2, stop)] for at in range(start, stop, 2))
images = ImageBatches(batches, 11, 2, sharding.local_mesh())
bank = input_pipeline.build_view_bank(
    jax.random.key(1), encoder, {"backbone": params["backbone"]}, images, views=2, family="digits")
found["asked"] = asked
np.save(f"{folder}/bank-{number}.npy", bank)
with open(f"{folder}/found-{number}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of each of the processes, with two devices each."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(number), str(COUNT), str(port), str(folder)], cwd=ROOT, env=environment
        )
        for number in range(COUNT)
    ]
    assert [process.wait(timeout=200) for process in started] == [0] * COUNT
    results = [json.loads((folder / f"found-{number}.json").read_text()) for number in range(COUNT)]
    for number, one in enumerate(results):
        one["bank"] = np.load(folder / f"bank-{number}.npy")
        one["order"] = (folder / "order").read_text()
    return results


def test_everyone_gets_everyones_rows_to_the_last_bit(found):
    rows = [(np.arange(number * 2)[:, None] / 3 + number).tolist() for number in range(COUNT)]
    for one in found:
        assert one["distributed"] and one["gathered"] == rows
        assert one["nothing"] == [[0, 1]] * COUNT
        assert one["texts"] == ["", "ä"]
        assert one["broadcast"] == "said by 0"
        assert one["all"] == [True, False]
    assert [one["first"] for one in found] == [True, False]


def test_an_error_of_one_process_is_raised_in_all(found):
    assert [one["shared"] for one in found] == ["one of them"] * COUNT


def test_differing_values_are_an_error_in_all(found):
    (message,) = {one["differing"] for one in found}
    assert message.startswith("--bits") and "17" in message and "16" in message


def test_the_first_goes_first(found):
    assert [one["first saw"] for one in found] == ["0"] * COUNT
    assert sorted(found[0]["order"]) == ["0", "1"] and found[0]["order"][0] == "0"


def test_a_batch_is_made_of_what_each_process_holds(found):
    assert sorted(row for one in found for row in one["rows"]) == list(range(12))
    assert all(len(one["rows"]) == 6 for one in found)
    expected = sum(2.0 * row * (row + 1) for row in range(12))
    assert [one["weighted"] for one in found] == [expected] * COUNT


def test_a_bank_is_computed_once_each_process_its_share(found):
    encoder, params, _ = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=8, image_size=8, hidden=8)
    images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    alone = input_pipeline.build_view_bank(
        jax.random.key(1),
        encoder,
        {"backbone": params["backbone"]},
        ImageBatches(lambda start, stop: (images[at : min(at + 2, stop)] for at in range(start, stop, 2)), 11, 2),
        views=2,
        family="digits",
    )
    for one in found:
        np.testing.assert_allclose(one["bank"], alone, rtol=1e-3, atol=1e-5)
        assert np.array_equal(one["bank"], found[0]["bank"])
    assert [one["asked"] for one in found] == [[[0, 6]] * 2, [[6, 11]] * 2]


@given(count=st.integers(0, 10_000), processes=st.integers(1, 300))
def test_shares_are_the_whole_in_order_and_differ_by_one_at_most(count, processes):
    shares = [multihost.share(count, ProcessIndex(number, processes)) for number in range(processes)]
    assert [row for share in shares for row in range(share.start, share.stop)] == list(range(count))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(parts=st.integers(0, 500), count=st.integers(1, 64))
def test_every_part_is_one_processs(parts, count):
    taken = [part for process in range(count) for part in multihost.strided_share(parts, ProcessIndex(process, count))]
    assert sorted(taken) == list(range(parts))
    sizes = [len(multihost.strided_share(parts, ProcessIndex(process, count))) for process in range(count)]
    assert max(sizes) - min(sizes) <= 1


def test_alone_a_process_is_the_first_of_one():
    initialize.initialize()
    assert multihost.is_first_process() and not multihost.is_distributed() and multihost.share(5) == slice(0, 5)
    assert multihost.gather_texts("mine") == ["mine"] and multihost.broadcast_text("mine") == "mine"


@pytest.fixture
def handlers():
    """Restores the handlers of signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_closed_terminal_stops_a_run_as_sigterm_does(handlers):
    multihost.install_sigterm_handler()
    with pytest.raises(multihost.Preempted):
        signal.raise_signal(signal.SIGHUP)
    with pytest.raises(multihost.Preempted), multihost.sigterm_flag() as came:
        assert not came()
        signal.raise_signal(signal.SIGHUP)
        assert came()


def test_loops_of_several_processes_count_their_checks_together(monkeypatch):
    """A signal between two loops stops all processes at one of the next loop's checks, by its number."""
    numbers = []
    monkeypatch.setattr(multihost, "is_distributed", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", numbers.append)
    for _ in range(2):
        with multihost.sigterm_flag() as came:
            came(), came()
    assert np.diff(numbers).tolist() == [1, 1, 1]


def test_under_nohup_a_closed_terminal_stops_nothing(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    multihost.install_sigterm_handler()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_output_to_a_closed_terminal_is_no_error(tmp_path):
    terminal, descriptor = os.openpty()
    multihost.replace_closed_terminal([descriptor])
    assert os.isatty(descriptor)
    os.close(terminal)
    with pytest.raises(OSError, match=r".*"):
        os.write(descriptor, b"lost")
    with (tmp_path / "log").open("w") as file:
        multihost.replace_closed_terminal([descriptor, file.fileno()])
        assert os.write(file.fileno(), b"kept") == 4
    assert os.write(descriptor, b"nowhere") == 7
    assert (tmp_path / "log").read_bytes() == b"kept"
    os.close(descriptor)
