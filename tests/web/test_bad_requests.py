"""10,000 bad requests in a row."""

import gc
import json
import os
import pathlib
import random
import resource
import tempfile
import threading

from tests.web import fake
from tests.web.conftest import running, until


def bad_request(number: int, generator: random.Random) -> tuple[str, str, bytes | None, dict[str, str]]:
    kind = number % 8
    noise = "".join(generator.choices("abc/.%:;?&=", k=20))
    return [
        ("GET", "/" + noise.replace("%", "%25"), None, {}),
        ("GET", "/thumbnail/%2e%2e%2f" + str(number), None, {}),
        ("POST", "/search", generator.randbytes(200), {}),
        ("POST", "/search", b"\x89PNG\r\n\x1a\n" + generator.randbytes(100), {"Content-Type": "image/png"}),
        ("POST", "/search", b"--x\r\n" + generator.randbytes(50), {"Content-Type": "multipart/form-data; boundary=x"}),
        ("GET", f"/search?k={noise.replace('%', '').replace('&', '')}", None, {}),
        ("PUT", "/gradio_api/upload", b"x" * 1000, {"X-Forwarded-For": f"10.0.{number % 250}.1"}),
        ("GET", f"/image/{number:016x}", None, {"Host": "evil.example"}),
    ][kind]


def test_ten_thousand_bad_requests_leave_nothing_behind(photos):
    """The server answers them all, then a good one as before; neither memory, files, threads nor the disk grow."""
    generator = random.Random(0)
    before = set(os.listdir(tempfile.gettempdir()))
    with running(fake.FakeCollection(photos)) as served:
        connection = served.connection()

        def ask(number: int) -> int:
            nonlocal connection
            method, path, body, headers = bad_request(number, generator)
            for _ in range(2):
                try:
                    connection.request(method, path, body, headers)
                    response = connection.getresponse()
                    assert "error" in json.loads(response.read())
                    return response.status
                except (ConnectionError, OSError):  # those that may not go on were closed
                    connection.close()
            raise AssertionError(path)

        for number in range(1000):
            ask(number)
        gc.collect()
        memory, files, threads = held()
        statuses = {ask(number) for number in range(1000, 10_000)}
        assert min(statuses) >= 400
        assert max(statuses) < 500
        gc.collect()
        after = held()
        assert after[0] - memory < 20
        assert after[1] - files < 10
        assert after[2] - threads < 10
        connection.close()
        assert served.json("/search", method="POST", body=fake.encoded(fake.picture(1)))[0] == 200
        rates, bodies = served.guard._rates, served.guard._bodies
        until(lambda: not rates._now)
        assert (bodies._count, bodies._bytes) == (0, 0)
    new = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in new if not name.startswith("pytest-")]


def held() -> tuple[float, int, int]:
    """Returns this process's memory in MB, open files and threads."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6, len(os.listdir("/proc/self/fd")), threading.active_count()
