"""Photos that wait are encoded together; who asks when all is over is told so."""

import threading

import numpy as np
import pytest

from cib_jax.web.batching import Batches
from cib_jax.web.decoding import BusyError


def test_who_asks_after_the_end_is_told_and_does_not_wait_for_ever():
    batches = Batches(lambda squares: np.packbits(squares[:, 0, :8, 0] > 0, axis=1), 8)
    square = np.zeros((8, 8, 3), np.uint8)
    square[0, 1] = 1
    assert batches.code(square).tolist() == [0b01000000]
    batches.close()
    told = []

    def ask():
        with pytest.raises(BusyError, match="The server is stopping"):
            batches.code(square)
        told.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(10)
    assert told
