"""What passes between the server and a process that decodes: a line of JSON, then bytes, both of bounded length."""

import json
import socket
import struct
import time
from typing import Any

_LENGTHS = struct.Struct("!II")
MOST_HEAD = 1 << 16
MOST_BYTES = 1 << 29


class BrokenError(Exception):
    """The other side is gone, or sent what nobody of this package sends."""


def send(connection: socket.socket, head: dict[str, Any], content: bytes, *, until: float | None = None) -> None:
    """Sends a message.

    Args:
      until: on the clock `time.monotonic`; None waits without end.

    Raises:
      TimeoutError: it was not taken in time.
      BrokenError: the other side is gone.
    """
    line = json.dumps(head).encode()
    try:
        connection.settimeout(_left(until))
        connection.sendall(_LENGTHS.pack(len(line), len(content)) + line)
        connection.settimeout(_left(until))
        connection.sendall(content)
    except TimeoutError:
        raise
    except OSError as error:
        raise BrokenError(str(error)) from None


def receive(
    connection: socket.socket, *, most: int = MOST_BYTES, until: float | None = None
) -> tuple[dict[str, Any], bytes]:
    """Returns the next message.

    Args:
      most: bytes beside the line; more are taken for nonsense.
      until: on the clock `time.monotonic`; None waits without end.

    Raises:
      TimeoutError: it did not come in time.
      BrokenError: the other side is gone, or it is no message.
    """
    head, content = _LENGTHS.unpack(_exactly(connection, _LENGTHS.size, until))
    if head > MOST_HEAD or content > most:
        raise BrokenError(f"a message of {head} and {content} bytes")
    try:
        line = json.loads(bytes(_exactly(connection, head, until)))
    except ValueError:
        raise BrokenError("no JSON") from None
    if not isinstance(line, dict):
        raise BrokenError("no message")
    return line, bytes(_exactly(connection, content, until))


def _exactly(connection: socket.socket, count: int, until: float | None) -> bytearray:
    found = bytearray(count)
    view, had = memoryview(found), 0
    while had < count:
        try:
            connection.settimeout(_left(until))
            came = connection.recv_into(view[had:], min(count - had, 1 << 20))
        except TimeoutError:
            raise
        except OSError as error:
            raise BrokenError(str(error)) from None
        if not came:
            raise BrokenError("it is gone")
        had += came
    return found


def _left(until: float | None) -> float | None:
    if until is None:
        return None
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
