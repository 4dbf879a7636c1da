"""The transient message of work that prints nothing for a while. Imports no other library, to be shown at once."""

import contextlib
import shutil
import sys
import threading

LOADING = "Loading JAX and other libraries; the first start takes longest"


class Hint:
    """A transient message on a terminal that is removed by the next output; elsewhere nothing is printed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._message = ""
        self._visible = False

    def show(self, message: str, delay: float = 1.0) -> None:
        """Shows a message after `delay` seconds, unless `clear` is called before: work that ends sooner needs none.

        In place of a message that is shown already, it appears at once.
        """
        self._message = message
        if self._visible:
            self._print()
            return
        timer = threading.Timer(delay, self._print)
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # no memory for a thread
            timer.start()

    def clear(self) -> None:
        """Removes the message, or keeps it from appearing."""
        with self._lock:
            self._message = ""
            if self._visible:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
                self._visible = False

    def _print(self) -> None:
        with self._lock:
            if self._message and sys.stderr.isatty():
                before, self._visible = "\r\x1b[K" if self._visible else "", True
                # Cut to one line: only the current line can be removed again.
                sys.stderr.write(before + self._message[: shutil.get_terminal_size().columns - 1])
                sys.stderr.flush()


HINT = Hint()
"""The hint of this process; the functions of `console` clear it before they print."""
