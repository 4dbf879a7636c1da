"""Photos that come at the same time, encoded together."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
from jaxtyping import UInt8

from cib_jax.web.decoding import BusyError

SIZES = (1, 4, 16)
"""Of batches; each is compiled once, at the start."""

Encode = Callable[[UInt8[np.ndarray, "n side side 3"]], UInt8[np.ndarray, "n bytes"]]


class Batches:
    """A thread that takes what waits, up to `SIZES[-1]`, as one batch. Any number of threads may ask. Close it."""

    def __init__(self, encode: Encode, side: int) -> None:
        """Compiles the programs, which takes a while, and starts the thread."""
        self._encode = encode
        self._waiting: queue.SimpleQueue[tuple[UInt8[np.ndarray, "side side 3"], Future[np.ndarray]] | None]
        self._waiting = queue.SimpleQueue()
        self._closing, self._closed = threading.Lock(), False
        for size in SIZES:
            encode(np.zeros((size, side, side, 3), np.uint8))
        self._thread = threading.Thread(target=self._work, name="encoding", daemon=True)
        self._thread.start()

    def code(self, square: UInt8[np.ndarray, "side side 3"]) -> UInt8[np.ndarray, " bytes"]:
        """Returns the packed code of a photo.

        Raises:
          BusyError: it is closed.
        """
        future: Future[np.ndarray] = Future()
        with self._closing:
            if self._closed:
                raise BusyError("The server is stopping.")
            self._waiting.put((square, future))
        return future.result()

    def close(self) -> None:
        """Ends the thread once all that waits is encoded."""
        with self._closing:  # behind what is asked after this, nobody would be left to answer
            self._closed = True
            self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, last = [first], False
            while len(batch) < SIZES[-1]:
                try:
                    more = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    last = True
                    break
                batch.append(more)
            self._answer(batch)
            if last:
                return

    def _answer(self, batch: list[tuple[np.ndarray, Future[np.ndarray]]]) -> None:
        size = next(size for size in SIZES if size >= len(batch))
        try:
            squares = np.stack([square for square, _ in batch])
            padded = np.concatenate([squares, np.zeros((size - len(batch), *squares.shape[1:]), np.uint8)])
            codes = self._encode(padded)
        except BaseException as error:
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), code in zip(batch, codes, strict=False):
            future.set_result(code)
