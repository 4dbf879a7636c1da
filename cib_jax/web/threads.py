"""Work that blocks, in a bounded number of threads, beside the event loop; clients take turns."""

import asyncio
import collections
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cib_jax.web.decoding import BusyError

T = TypeVar("T")


class Threads:
    """A few threads, and a bound on what waits for them. Asked from one event loop.

    Whoever asks for much waits for himself: a free thread goes to each client that waits in turn.
    """

    def __init__(self, threads: int, waiting: int, name: str, *, patience: float = 20.0) -> None:
        """Starts no thread yet.

        Args:
          threads: that work at the same time.
          waiting: calls that may wait.
          name: of the threads.
          patience: seconds that a call waits.
        """
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free, self._most, self._patience, self._count = threads, waiting, patience, 0
        self._waiting: collections.OrderedDict[str, collections.deque[asyncio.Future[None]]]
        self._waiting = collections.OrderedDict()

    async def run(self, client: str, function: Callable[..., T], *arguments: Any) -> T:
        """Returns what the function does.

        Raises:
          BusyError: too much waits, or it waited too long.
        """
        if self._free:
            self._free -= 1
        else:
            await self._turn(client)
        try:
            future = asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        except RuntimeError:  # it is closed
            raise BusyError("The server is stopping.") from None
        # Its thread is taken until it is done, not until the client has lost patience.
        future.add_done_callback(self._done)
        return await asyncio.shield(future)

    def close(self) -> None:
        """Begins nothing more; what has begun ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, client: str) -> None:
        if self._count >= self._most:
            raise BusyError("The server has too much to do; try again in a moment.")
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, collections.deque()).append(ticket)
        self._count += 1
        try:
            await asyncio.wait_for(ticket, self._patience)
        except BaseException as error:
            if ticket.done() and not ticket.cancelled():  # given a thread at the same moment
                self._give_on()
            if isinstance(error, TimeoutError):
                raise BusyError("The server has too much to do; try again in a moment.") from None
            raise
        finally:
            self._count -= 1

    def _done(self, future: "asyncio.Future[Any]") -> None:
        self._give_on()
        if not future.cancelled():
            future.exception()  # read: nobody may be left who would

    def _give_on(self) -> None:
        while self._waiting:
            client, tickets = self._waiting.popitem(last=False)
            while tickets and tickets[0].done():  # who has lost patience
                tickets.popleft()
            if tickets:
                tickets.popleft().set_result(None)
                if tickets:
                    self._waiting[client] = tickets  # behind all others
                return
        self._free += 1
