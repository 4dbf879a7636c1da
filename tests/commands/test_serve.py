"""The search page of an index beside a notebook: its process, its frame, its end."""

import http.client
import importlib.machinery
import json
import socket
import subprocess
import sys
import types

import pytest

from cib_jax.commands import serve
from cib_jax.commands.serve import Page, serve_notebook
from cib_jax.errors import IndexFolderError, UserError, WebError
from tests.commands import indexing
from tests.end_to_end.processes import gone, wait_until

PUBLIC = "https://7860-m-s-abc.us-west1-0.prod.colab.dev/"


class Colab(types.ModuleType):
    """`google.colab.output` as far as a notebook uses it: what is asked of it is written down."""

    def __init__(self):
        super().__init__("google.colab.output")
        self.shown = []

    def eval_js(self, program):
        assert program.startswith("google.colab.kernel.proxyPort(")
        return PUBLIC

    def serve_kernel_port_as_iframe(self, port, path="/", width="100%", height="400"):
        self.shown.append((port, height))


@pytest.fixture
def colab(monkeypatch):
    made = Colab()
    for name, module in (("google.colab", types.ModuleType("google.colab")), ("google.colab.output", made)):
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    indexing.save_hasher(folder / "hasher")
    indexing.fill(folder / "photos", 9)
    indexing.run(folder / "index", folder / "photos", workdir=folder / "hasher")
    return folder / "index"


def ask(port, path="/", method="GET", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


@pytest.mark.slow
def test_on_colab_its_frame_works_and_can_be_stopped(index, colab, capsys):
    """Colab's proxy asks by the public name or as localhost; the browser tells the public origin in both cases.

    Without the server: below; what that answers: tests/web/test_middleware.py.
    """
    page = serve_notebook(index, port=0)
    assert page.running
    assert page.show(height=500) is None
    assert colab.shown == [(page.port, "500")]
    assert PUBLIC in capsys.readouterr().out
    name = PUBLIC.split("/")[2]
    photo = next((index.parent / "photos").rglob("*.jpg")).read_bytes()
    for host in (name, f"localhost:{page.port}"):
        status, headers, _ = ask(page.port, Host=host)
        assert status == 200
        ancestors = headers["content-security-policy"].partition("frame-ancestors ")[2].split()
        assert ancestors == ["'self'", "https://colab.research.google.com", "https://*.googleusercontent.com"]
        assert "x-frame-options" not in headers
        asked = {"Host": host, "Origin": PUBLIC.rstrip("/"), "Sec_Fetch_Site": "same-origin"}
        status, _, content = ask(page.port, "/search?k=1", "POST", photo, **asked)
        assert (status, json.loads(content)["results"][0]["distance"]) == (200, 0)
    assert ask(page.port, Host="7860-m-s-evil.us-west1-0.prod.colab.dev")[0] == 421
    assert ask(page.port, "/search", "POST", photo, Host=name, Origin="https://evil.example")[0] == 403
    page.stop()
    with pytest.raises(WebError, match=r"https://7860-"):
        page.show()


def test_the_server_ends_with_the_process_that_started_it():
    """Which a shell stands for that is killed."""
    watched = (
        f"import os, time; os.environ[{serve.PARENT!r}] = str(os.getppid()); from cib_jax.commands import serve; "
        "serve.stop_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
    )
    shell = subprocess.Popen(["sh", "-c", '"$0" -c "$1"; true', sys.executable, watched], stdout=subprocess.PIPE)
    number = int(shell.stdout.readline())
    shell.kill()
    shell.wait()
    wait_until([], lambda: gone(number), timeout=30)


@pytest.fixture
def stand_in(monkeypatch):
    """A function that puts a server in place of the real one, which checks an expression of its flags and answers."""
    started = subprocess.Popen

    def put(expression):
        program = (
            "import http.server, socketserver, sys; given = dict(one.split('=', 1) for one in sys.argv[1:]); "
            "handler = type('H', (http.server.BaseHTTPRequestHandler,), {'do_GET': lambda self: self.send_response(200)"
            f" or self.end_headers()}}); assert {expression}; socketserver.TCPServer.allow_reuse_address = True; "
            "socketserver.TCPServer((given['--host'], int(given['--port'])), handler).serve_forever()"
        )
        monkeypatch.setattr(
            subprocess, "Popen", lambda line, **how: started([line[0], "-c", program, *line[3:]], **how)
        )

    return put


def test_on_colab_the_server_is_given_its_public_name_and_who_may_frame_it(index, colab, capsys, stand_in):
    host = PUBLIC.split("/")[2]
    frames = "https://colab.research.google.com,https://*.googleusercontent.com"
    stand_in(f"(given['--names'], given['--frames']) == {(host, frames)}")
    page = serve_notebook(index, port=0)
    assert page.running and page.show(height=500) is None
    assert colab.shown == [(page.port, "500")] and PUBLIC in capsys.readouterr().out
    page.stop()
    with pytest.raises(WebError, match=r"https://7860-"):
        page.show()


def test_served_again_it_takes_the_place_of_the_page_before(index, stand_in):
    """The server is a stand-in that answers at once."""
    stand_in("given['--frames'].startswith('http://localhost:*') and '--names' not in given")
    first = serve_notebook(index, port=0)
    second = serve_notebook(index, port=first.port)
    assert second.url == f"http://127.0.0.1:{first.port}/"
    assert (first.running, second.running) == (False, True)
    shown = second.show(height=500)._repr_html_()
    assert f'src="{second.url}' in shown and 'height="500"' in shown
    serve.stop_all()
    assert not second.running
    second.stop()


def test_what_cannot_be_served_is_an_error_of_one_sentence(index, tmp_path):
    with pytest.raises(IndexFolderError, match=r"^--index\b"):
        serve_notebook(tmp_path / "nothing")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^--port\b.*{port}"):
            serve_notebook(index, port=port)


@pytest.mark.parametrize(
    ("program", "patience", "told"),
    [
        (
            "print('some log'); raise SystemExit('python -m cib_jax: --x is wrong; mend it')",
            60,
            "d: --x is wrong; mend it$",
        ),
        ("raise SystemExit(3)", 60, "nothing$"),
        ("import time; time.sleep(60)", 0, "0 seconds"),
    ],
)
def test_a_process_that_does_not_serve_is_an_error_and_is_ended(tmp_path, program, patience, told):
    with (tmp_path / "log").open("w+b") as log:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=log, stderr=subprocess.STDOUT)
        page = Page(process, log, 1, None)
        with pytest.raises(WebError, match=told):
            page.wait(patience)
        page.stop()
        assert not page.running
