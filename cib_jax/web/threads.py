"""Work that blocks, in a bounded number of threads, beside the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cib_jax.web.decoding import BusyError

T = TypeVar("T")


class Threads:
    """A few threads, and a bound on what waits for them. Asked from one event loop."""

    def __init__(self, threads: int, waiting: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._most, self._count = threads + waiting, 0

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Returns what the function does.

        Raises:
          BusyError: too much waits.
        """
        if self._count >= self._most:
            raise BusyError("The server has too much to do; try again in a moment.")
        self._count += 1
        # Counted until it is done, not until the client has lost patience.
        future = asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        future.add_done_callback(self._done)
        return await asyncio.shield(future)

    def close(self) -> None:
        """Begins nothing more; what has begun ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _done(self, future: "asyncio.Future[Any]") -> None:
        self._count -= 1
        if not future.cancelled():
            future.exception()  # read: nobody may be left who would
