"""Threads that clients share fairly, and photos that are encoded together."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest
from starlette.exceptions import HTTPException

from cib_jax.web.concurrency import EncodeBatcher, FairExecutor


@contextlib.contextmanager
def unavailable():
    """Checks that the block raises an error with status 503."""
    with pytest.raises(HTTPException) as error:
        yield
    assert error.value.status_code == 503


def test_threads_are_given_to_clients_in_turn():
    """Compares with the order of rounds over the clients, with one thread and a call that holds it."""

    async def scenario():
        executor, order, go = FairExecutor(1, 10, "test", patience=60), [], threading.Event()

        async def waiting(count):
            while executor.waiting != count:
                await asyncio.sleep(0)

        first = asyncio.ensure_future(executor.run("a", go.wait))
        await asyncio.sleep(0)
        calls = [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("c", 1), ("b", 2)]
        tasks = [asyncio.ensure_future(executor.run(client, order.append, (client, n))) for client, n in calls]
        await waiting(6)
        tasks.pop(1).cancel()  # a client that disconnects gives up its turn
        await waiting(5)
        go.set()
        await asyncio.gather(first, *tasks)
        # One thread is free again, and no more than one.
        go.clear()
        first = asyncio.ensure_future(executor.run("a", go.wait))
        second = asyncio.ensure_future(executor.run("b", order.append, "after"))
        await waiting(1)
        assert "after" not in order
        go.set()
        await asyncio.gather(first, second)
        assert executor.waiting == 0
        executor.close()
        return order

    assert asyncio.run(scenario()) == [("a", 1), ("b", 1), ("c", 1), ("a", 3), ("b", 2), "after"]


def test_a_call_that_waits_too_long_or_behind_too_many_is_refused():
    async def scenario():
        executor, go = FairExecutor(1, 1, "test", patience=0.05), threading.Event()
        first = asyncio.ensure_future(executor.run("a", go.wait))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(executor.run("b", int))
        await asyncio.sleep(0)
        with unavailable():
            await executor.run("c", int)
        with unavailable():
            await second
        go.set()
        await first
        assert await executor.run("c", int) == 0
        executor.close()
        with unavailable():
            await executor.run("c", int)

    asyncio.run(scenario())


def signs(squares: np.ndarray) -> np.ndarray:
    return np.packbits(squares[:, 0, :8, 0] > 0, axis=1)


def square(bits: list[int]) -> np.ndarray:
    return np.broadcast_to(np.array(bits, np.uint8)[None, :, None], (8, 8, 3))


def test_photos_that_wait_are_encoded_together():
    sizes, go = [], threading.Event()
    go.set()

    def encode(squares):
        go.wait()
        sizes.append(len(squares))
        return signs(squares)

    batcher = EncodeBatcher(encode, 8)
    assert sizes == [1, 4, 16]  # compiled before the first photo
    go.clear()
    words = np.random.default_rng(0).integers(0, 2, (25, 8))
    futures = [batcher.submit(square(word)) for word in words]
    go.set()
    codes = [future.result(60) for future in futures]
    batcher.close()
    assert np.array_equal(codes, np.packbits(words, axis=1))
    # The thread takes from 1 to 16 photos at first, then what is left, in batches padded to one of the sizes.
    assert set(sizes[3:]) <= {1, 4, 16}
    assert 2 <= len(sizes[3:]) <= 3


def test_an_error_reaches_all_photos_of_its_batch_and_no_other():
    def encode(squares):
        if squares.any():
            raise RuntimeError("broken")
        return signs(squares)

    batcher = EncodeBatcher(encode, 8)
    with pytest.raises(RuntimeError, match="broken"):
        batcher.submit(square([1] * 8)).result(60)
    assert batcher.submit(square([0] * 8)).result(60).tolist() == [0]
    batcher.close()


def test_a_closed_batcher_encodes_what_waits_and_refuses_more():
    batcher = EncodeBatcher(signs, 8)
    waiting = [batcher.submit(square([0, 1, 0, 0, 0, 0, 0, n % 2])) for n in range(20)]
    batcher.close()
    assert [future.result(60).tolist() for future in waiting] == [[0b01000000], [0b01000001]] * 10
    with unavailable():
        batcher.submit(square([0] * 8))
