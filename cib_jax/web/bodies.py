"""The body of a request, read into memory within bounds of size, time and number."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from cib_jax.web.limits import Limits

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]


class BodyError(Exception):
    """A body that is not taken: a status of HTTP and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class GoneError(Exception):
    """The client is gone."""


class Bodies:
    """All bodies that are held now. For one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._count, self._bytes = 0, 0

    async def read(self, receive: Receive, length: str | None, most: int) -> "Body":
        """Returns the whole body; `release` it once it is done with.

        Args:
          length: the header Content-Length.
          most: bytes.

        Raises:
          BodyError: it is too large, too slow, or there are too many.
          GoneError: the client is gone.
        """
        too_large = BodyError(413, f"The photo is larger than {most // 1_000_000} MB: make it smaller.")
        if length is not None and not (length.isascii() and length.isdigit()):
            raise BodyError(400, "Content-Length is no number.")
        if length is not None and int(length[:20]) > most:
            raise too_large
        if self._count >= self._limits.bodies:
            raise BodyError(503, "Too many photos are coming in; try again in a moment.")
        body = Body(self)
        chunks: list[bytes] = []
        self._count += 1
        begun = time.monotonic()
        try:
            while True:
                allowed = self._limits.body_seconds + body.size / self._limits.body_rate
                try:
                    message = await asyncio.wait_for(receive(), max(0.0, begun + allowed - time.monotonic()))
                except TimeoutError:
                    raise BodyError(408, "The photo came in too slowly; try again.") from None
                if message["type"] == "http.disconnect":
                    raise GoneError
                chunk = message.get("body", b"")
                if body.size + len(chunk) > most:
                    raise too_large
                if self._bytes + len(chunk) > self._limits.bodies_mb * 1_000_000:
                    raise BodyError(503, "Too many photos are coming in; try again in a moment.")
                self._bytes += len(chunk)
                body.size += len(chunk)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    body.content = b"".join(chunks)
                    return body
        except BaseException:
            body.release()
            raise

    def give_back(self, size: int) -> None:
        """Counts one body less; what `Body.release` does."""
        self._count -= 1
        self._bytes -= size


class Body:
    """One body, and its part of the bounds."""

    def __init__(self, held: Bodies) -> None:
        self.content, self.size = b"", 0
        self._held: Bodies | None = held

    def release(self) -> None:
        """Frees it; more than once does no harm."""
        held, self._held = self._held, None
        if held is not None:
            held.give_back(self.size)
            self.content = b""
