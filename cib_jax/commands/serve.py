"""A search page for an index, and its JSON API, until the process is ended."""

import atexit
import contextlib
import functools
import http.client
import importlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from typing import Any, NamedTuple

import rich.console

import cib_jax
from cib_jax import web
from cib_jax.console import print_message
from cib_jax.data import cache
from cib_jax.errors import UserError, WebError
from cib_jax.storage import photo_table
from cib_jax.storage.collection import Collection

# jobs.serve: A search page for an index, and its JSON API, until the process is ended.


def serve(
    uri: pathlib.Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    below: str = "",
    console: rich.console.Console | None = None,
    **limits: Any,
) -> None:
    """Serves an index until SIGTERM or Ctrl-C; what is indexed meanwhile appears within a minute.

    Args:
      uri: of the index.
      host: address to listen at; "0.0.0.0" is all of this machine.
      port: 0 takes one that is free.
      below: the folder, such as "/photos", from which a reverse proxy passes on what is asked below it.
      console: where to report.
      limits: fields of `web.limits.Limits`, of which `megapixels` is a photo's.

    Raises:
      WebError: the extra `web` is not installed.
      TableError, SavedError: there is no index, or it cannot be read.
      SearchError: FAISS is not installed.
      BindError, ProxyError, FrameError, DecoderError: as `web.server.serve`.
    """
    web.check_installed()
    from cib_jax.web import page, server
    from cib_jax.web.settings import Settings

    console = console or rich.console.Console()
    if below and not below.startswith("/"):
        raise WebError(f"--below must be a path that begins with a slash, got {below!r}; try /photos", field="--below")
    settings = Settings(**limits)
    with server.listening(host, port):
        pass  # an address that cannot be used is refused before the index is opened
    print_message(console, f"Opening {uri}")
    collection = Collection.open(uri)

    def renewed(_: object) -> Collection:
        nonlocal collection
        collection = collection.renewed()
        return collection

    print_message(console, f"Preparing to search {len(collection):,} photos of {collection.root}")
    server.serve(
        collection,
        host=host,
        port=port,
        page=functools.partial(page.mount, settings=settings, root_path=below or None),
        renew=renewed,
        settings=settings,
        print_line=lambda sentence: print_message(console, sentence),
    )


# jobs.beside_notebook: The search page beside a notebook: served by a process of its own, shown in a frame, and stopped again.


# A notebook's page is Jupyter's own of this machine, or lies in frames of Colab's.
_JUPYTER = ("http://localhost:*", "http://127.0.0.1:*")
_COLAB = ("https://colab.research.google.com", "https://*.googleusercontent.com")
_HOST = "127.0.0.1"

_beside: dict[int, "Page"] = {}
"""By port, what this notebook serves."""


class Frame(NamedTuple):
    """A page in a frame, as notebooks show what a cell ends with."""

    url: str
    height: int
    """In pixels."""

    def _repr_html_(self) -> str:
        return f'<iframe src="{self.url}" width="100%" height="{self.height}" style="border: 0"></iframe>'


class Page:
    """A search page that is served until it is stopped, or the notebook's kernel ends."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Any, port: int, public: str | None) -> None:
        self._process, self._log, self.port = process, log, port
        self.url = public or f"http://{_HOST}:{port}/"

    @property
    def running(self) -> bool:
        """Whether it is served now."""
        return self._process.poll() is None

    def show(self, height: int = 800) -> "Frame | None":
        """Shows a link to the page, and the page in a frame below the cell, whose last line this call has to be.

        Args:
          height: in pixels.

        Raises:
          ServingError: it is not served any more.
        """
        if not self.running:
            raise WebError(f"the page at {self.url} has been stopped; serve it again")
        print(f"The page, in a window of its own: {self.url}")
        if (colab := _colab()) is not None:
            colab.serve_kernel_port_as_iframe(self.port, height=str(height))
            return None
        return Frame(self.url, height)

    def stop(self) -> None:
        """Ends the server, if it still runs, and waits until it has ended."""
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if _beside.get(self.port) is self:
            del _beside[self.port]
        for file in (self._process.stdin, self._log):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()

    def said(self) -> str:
        """Returns what the server has printed."""
        self._log.seek(0)
        return str(self._log.read().decode(errors="replace"))


def serve_notebook(uri: pathlib.Path | str, *, port: int = 7860, patience: float = 300.0) -> Page:
    """Returns the search page of an index, once it answers; what this notebook served at the port before is stopped.

    The process takes this machine's CPU: an accelerator is the notebook's own. It listens to this machine alone; Colab
    lets the notebook's owner through to it, and nobody else.

    Args:
      uri: of the index.
      port: where it listens; 0 takes one that is free.
      patience: seconds that it may take to answer.

    Raises:
      WebError, TableError, SavedError, SearchError: as `jobs.serve.serve`.
      ServingError: it ends at once, or does not answer in time.
    """
    web.check_installed()
    from cib_jax.storage.photo_table import PhotoTable
    from cib_jax.web import server

    if port in _beside:
        _beside[port].stop()
    PhotoTable.open(photo_table.normalize_uri(uri))  # told now, in the class of its own
    with server.listening(_HOST, port) as listener:
        port = listener.getsockname()[1]
    public = _public(port)
    names = [name] if public and (name := urllib.parse.urlsplit(public).hostname) else []
    # As on the command line, so that it starts sooner the next time.
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache.home() / "jax")}
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    path = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    settings = {"uri": os.fspath(uri), "host": _HOST, "port": port, "hosts": names}
    settings["frames"] = list(_COLAB if public else _JUPYTER)
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `Page.stop`
    package = os.path.dirname(os.path.dirname(cib_jax.__file__))
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=kept | os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([package, *path])},
        start_new_session=True,  # else interrupting a cell would end it
    )
    page = Page(process, log, port, public)
    _beside[port] = page
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
    try:
        _await(page, patience)
    except BaseException:  # among them, that the cell is interrupted
        page.stop()
        raise
    return page


def _await(page: Page, patience: float) -> None:
    until = time.monotonic() + patience
    while not _answers(page.port):
        if not page.running:
            last = (page.said().strip() or "it said nothing").splitlines()[-1]
            raise WebError(f"the search page could not be started: {last}")
        if time.monotonic() > until:
            raise WebError(f"the search page did not answer in {patience:g} seconds; serve it again")
        time.sleep(0.2)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)  # past any proxy of the environment
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _colab() -> Any:
    """Returns Colab's module for outputs, None elsewhere."""
    try:
        found = importlib.util.find_spec("google.colab")
    except (ImportError, ValueError):
        found = None
    return importlib.import_module("google.colab.output") if found else None


def _public(port: int) -> str | None:
    """Returns the address under which Colab lets the notebook's owner, in a browser, through to a port; else None."""
    colab = _colab()
    return None if colab is None else str(colab.eval_js(f"google.colab.kernel.proxyPort({port})"))


@atexit.register
def _stop_all() -> None:
    for page in list(_beside.values()):
        page.stop()


def _main() -> None:
    """Serves what a line of JSON on the standard input says, until that input ends."""
    settings = json.loads(sys.stdin.readline())

    def watch() -> None:
        sys.stdin.read()  # whoever started this one is gone, killed maybe
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    pass  # REMOVED IMPORT

    try:
        serve(settings.pop("uri"), **{name: _tuple(value) for name, value in settings.items()})
    except UserError as refusal:
        sys.exit(str(refusal))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    _main()
