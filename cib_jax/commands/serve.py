"""Search page and JSON API of an index, served until the process ends; also from a notebook."""

import atexit
import contextlib
import functools
import html
import http.client
import importlib
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import rich.console

import cib_jax
from cib_jax import web
from cib_jax.console import MODULE, on_stdout, print_message
from cib_jax.errors import WebError
from cib_jax.files import count
from cib_jax.storage import photo_table
from cib_jax.storage.collection import Collection
from cib_jax.storage.photo_table import PhotoTable

PARENT = "CIB_JAX_PARENT"
"""Environment variable with the id of the process after which `serve` stops, too."""


def serve(
    index: pathlib.Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    names: Sequence[str] = (),
    below: str = "",
    console: rich.console.Console | None = None,
    **settings: Any,
) -> None:
    """Serves an index until SIGTERM or Ctrl-C; photos that are indexed meanwhile appear within a minute.

    Args:
      index: Folder or other address of the index.
      host: Address to listen at; "0.0.0.0" is every address of this machine.
      port: Port to listen at; 0 takes a free one.
      names: Host names by which browsers may request it, beside localhost; "*" allows any.
      below: Path, such as "/photos", under which a reverse proxy serves it.
      console: Console for messages.
      settings: Fields of `web.settings.Settings`: proxies, frames, searches, photo_mb and megapixels.
    """
    web.check_installed()
    from cib_jax.web import page, server
    from cib_jax.web.settings import Settings

    console = on_stdout(console)
    stop_with_parent()
    if below and not below.startswith("/"):
        raise WebError(f"--below must be a path that begins with a slash, got {below!r}; try /photos", field="--below")
    for name in ("proxies", "frames"):
        settings[name] = tuple(settings.get(name, ()))
    chosen = Settings(hosts=tuple(names), **settings)
    with server.listening(host, port):
        pass  # an address that cannot be used is refused before the index is opened
    print_message(console, f"Opening {index}")
    collection = Collection.open(index)

    def renew(_: object) -> Collection:
        nonlocal collection
        collection = collection.renewed()
        return collection

    print_message(console, f"Preparing to search {count(len(collection), 'photo')} of {collection.root}")
    server.serve(
        collection,
        host=host,
        port=port,
        page=functools.partial(page.mount, settings=chosen, root_path=below or None),
        renew=renew,
        settings=chosen,
        print_line=lambda sentence: print_message(console, sentence),
    )


def stop_with_parent() -> None:
    """Sends SIGTERM to this process once the process that the environment names as its parent has ended."""
    parent = int(os.environ.get(PARENT) or 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


# Beside a notebook

HOST = "127.0.0.1"
# Origins that frame a notebook's output: Jupyter's on this machine, or Colab's.
_JUPYTER = "http://localhost:*,http://127.0.0.1:*"
_COLAB = "https://colab.research.google.com,https://*.googleusercontent.com"

_pages: dict[int, "Page"] = {}  # those that this notebook serves, by port


class _Frame(NamedTuple):
    """A frame with a page, which a notebook shows as the result of a cell."""

    url: str
    height: int

    def _repr_html_(self) -> str:
        return f'<iframe src="{html.escape(self.url)}" width="100%" height="{self.height}" style="border: 0"></iframe>'


class Page:
    """A search page that is served until it is stopped, or the notebook's kernel ends."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: IO[bytes], port: int, public: str | None) -> None:
        self._process, self._log, self.port = process, log, port
        self.url = public or f"http://{HOST}:{port}/"

    @property
    def running(self) -> bool:
        """Whether the page is served now."""
        return self._process.poll() is None

    def show(self, height: int = 800) -> Any:
        """Prints a link to the page, and returns a frame with it, which a notebook shows if this is a cell's last line.

        Args:
          height: Height of the frame in pixels.

        Raises:
          WebError: The page has been stopped.
        """
        if not self.running:
            raise WebError(f"the page at {self.url} has been stopped; serve it again")
        print(f"The page, in a window of its own: {self.url}")
        if (colab := _colab()) is not None:
            colab.serve_kernel_port_as_iframe(self.port, height=str(height))
            return None
        return _Frame(self.url, height)

    def wait(self, patience: float) -> None:
        """Returns once the page answers, within `patience` seconds."""
        deadline = time.monotonic() + patience
        while not self._answers():
            if not self.running:
                self._log.seek(0)
                lines = self._log.read().decode(errors="replace").strip().splitlines() or ["it printed nothing"]
                # What is printed after the error was written before it, to a buffer.
                last = next((line for line in reversed(lines) if line.startswith(f"{MODULE}: ")), lines[-1])
                raise WebError(f"the search page could not be started: {last.removeprefix(f'{MODULE}: ')}")
            if time.monotonic() > deadline:
                raise WebError(f"the search page did not answer in {patience:g} seconds; serve it again")
            time.sleep(0.2)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)  # ignores proxies of the environment
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def stop(self) -> None:
        """Ends the server, if it still runs, and waits until it has ended."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if _pages.get(self.port) is self:
            del _pages[self.port]
        self._log.close()


def serve_notebook(index: pathlib.Path | str, *, port: int = 7860, patience: float = 300.0) -> Page:
    """Serves an index beside a notebook and returns its page once it answers; replaces an earlier page at the port.

    The server is a process of its own, `python -m cib_jax --mode=serve`, on the CPU, because an accelerator belongs to
    the notebook. It listens to this machine alone; Colab forwards the notebook's owner, and nobody else, to it.

    Args:
      index: Folder or other address of the index.
      port: Port to listen at; 0 takes a free one.
      patience: Seconds that the server may take to answer.

    Raises:
      WebError: The extra `web` is not installed, the port is in use, or the server ends or does not answer in time.
      IndexFolderError: There is no index.

    Examples:
      >>> import cib_jax as cib
      >>> page = cib.serve_notebook("INDEX")  # doctest: +SKIP
      >>> page.show()  # doctest: +SKIP
    """
    web.check_installed()
    from cib_jax.web import server

    if port in _pages:
        _pages[port].stop()
    PhotoTable.open(photo_table.normalize_uri(index))  # raises an error of its own class, at once
    with server.listening(HOST, port) as listener:
        port = listener.getsockname()[1]
    colab = _colab()
    # Address under which Colab forwards the browser of the notebook's owner to a port.
    public = None if colab is None else str(colab.eval_js(f"google.colab.kernel.proxyPort({port})"))
    flags = [f"--index={os.fspath(index)}", f"--host={HOST}", f"--port={port}"]
    flags.append(f"--frames={_COLAB if public else _JUPYTER}")
    if public and (name := urllib.parse.urlsplit(public).hostname):
        flags.append(f"--names={name}")
    package = os.path.dirname(os.path.dirname(cib_jax.__file__))
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `Page.stop`
    process = subprocess.Popen(
        [sys.executable, "-m", "cib_jax", "--mode=serve", *flags],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, PARENT: str(os.getpid())},
        start_new_session=True,  # otherwise interrupting a cell would end it
    )
    page = _pages[port] = Page(process, log, port, public)
    try:
        page.wait(patience)
    except BaseException:  # also if the cell is interrupted
        page.stop()
        raise
    return page


def _colab() -> Any:
    """Returns Colab's module for outputs, None elsewhere."""
    with contextlib.suppress(ImportError, ValueError):
        if importlib.util.find_spec("google.colab"):
            return importlib.import_module("google.colab.output")
    return None


@atexit.register
def stop_all() -> None:
    """Ends all servers of this notebook."""
    for page in list(_pages.values()):
        page.stop()
