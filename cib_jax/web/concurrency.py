"""Blocking work beside the event loop: threads shared fairly between clients, and encoding in batches."""

import asyncio
import collections
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from starlette.exceptions import HTTPException

T = TypeVar("T")

BATCH_SIZES = (1, 4, 16)
"""Batch sizes of the encoder; each is compiled once, at the start."""

Encode = Callable[[UInt8[np.ndarray, "n side side 3"]], UInt8[np.ndarray, "n bytes"]]


def unavailable(detail: str) -> HTTPException:
    """Returns the error for a request that the server cannot answer now."""
    return HTTPException(503, detail, {"retry-after": "2"})


class FairExecutor:
    """A bounded number of threads, and of calls that wait for one. Used from one event loop.

    A free thread is given to waiting clients in turn, so that a client with many requests delays only itself.
    """

    def __init__(self, threads: int, waiting: int, name: str, *, patience: float) -> None:
        """At most `waiting` calls wait for one of the threads, each for at most `patience` seconds."""
        self.waiting = 0
        """Number of calls that wait for a thread."""
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free, self._most, self._patience = threads, waiting, patience
        self._queues = collections.OrderedDict[str, collections.deque[asyncio.Future[None]]]()

    async def run(self, client: str, function: Callable[..., T], *arguments: Any) -> T:
        """Returns the result of a function that is called in a thread; raises an HTTPException if it waits too long."""
        if self._free:
            self._free -= 1
        else:
            await self._wait_for_turn(client)
        try:
            future = asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        except RuntimeError:  # the pool is shut down
            raise unavailable("The server is stopping.") from None
        # The thread is busy until the call ends, even if the client disconnects before.
        future.add_done_callback(self._finish)
        return await asyncio.shield(future)

    def close(self) -> None:
        """Starts no more calls; those that run are not interrupted."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _wait_for_turn(self, client: str) -> None:
        busy = unavailable("The server is busy; try again in a moment.")
        if self.waiting >= self._most:
            raise busy
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, collections.deque()).append(turn)
        self.waiting += 1
        try:
            await asyncio.wait_for(turn, self._patience)
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # a thread was given to this call at the same moment
                self._give_thread()
            if isinstance(error, TimeoutError):
                raise busy from None
            raise
        finally:
            self.waiting -= 1

    def _finish(self, future: "asyncio.Future[Any]") -> None:
        self._give_thread()
        if not future.cancelled():
            future.exception()  # marks it as retrieved, which asyncio expects even if the client has left

    def _give_thread(self) -> None:
        while self._queues:
            client, turns = self._queues.popitem(last=False)
            while turns and turns[0].done():  # calls that were given up
                turns.popleft()
            if turns:
                turns.popleft().set_result(None)
                if turns:
                    self._queues[client] = turns  # behind all other clients
                return
        self._free += 1


class EncodeBatcher:
    """A thread that encodes photos, those that wait together in one batch. Thread-safe. Must be closed."""

    def __init__(self, encode: Encode, side: int) -> None:
        """Compiles the encoder for all batch sizes of photos of `side` pixels, and starts the thread."""
        self._encode = encode
        self._waiting = queue.SimpleQueue[tuple[np.ndarray, Future[np.ndarray]] | None]()
        self._lock, self._closed = threading.Lock(), False
        for size in BATCH_SIZES:
            encode(np.zeros((size, side, side, 3), np.uint8))
        self._thread = threading.Thread(target=self._work, name="encode", daemon=True)
        self._thread.start()

    def submit(self, square: UInt8[np.ndarray, "side side 3"]) -> "Future[np.ndarray]":
        """Returns the packed code of a photo, as a future; raises an HTTPException if the batcher is closed."""
        future: Future[np.ndarray] = Future()
        with self._lock:
            if self._closed:
                raise unavailable("The server is stopping.")
            self._waiting.put((square, future))
        return future

    def close(self) -> None:
        """Ends the thread after all waiting photos are encoded."""
        with self._lock:
            self._closed = True
            self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        item = self._waiting.get()
        while item is not None:
            batch = [item]
            try:
                while len(batch) < BATCH_SIZES[-1] and (item := self._waiting.get_nowait()) is not None:
                    batch.append(item)
            except queue.Empty:
                pass
            self._encode_batch(batch)
            if item is not None:
                item = self._waiting.get()

    def _encode_batch(self, batch: list[tuple[np.ndarray, "Future[np.ndarray]"]]) -> None:
        size = next(size for size in BATCH_SIZES if size >= len(batch))
        try:
            squares = np.stack([square for square, _ in batch])
            padding = np.zeros((size - len(batch), *squares.shape[1:]), np.uint8)
            codes = self._encode(np.concatenate([squares, padding]))
            for (_, future), code in zip(batch, codes, strict=False):
                future.set_result(code)
        except BaseException as error:
            for _, future in batch:
                future.set_exception(error)
