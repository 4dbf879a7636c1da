"""Settings of the server: what a user may give."""

import pytest

from cib_jax.errors import WebError
from cib_jax.web.settings import Settings


@pytest.mark.parametrize("name", ["searches", "photo_mb", "megapixels"])
def test_a_number_below_one_is_refused(name):
    with pytest.raises(WebError, match="0") as error:
        Settings(**{name: 0})
    assert error.value.field == f"--{name}"


def test_a_proxy_is_an_address_or_a_network():
    Settings(proxies=("10.0.0.1", "10.0.0.1/8", "2001:db8::/32"))
    with pytest.raises(WebError, match="'nginx'") as error:
        Settings(proxies=("10.0.0.1", "nginx"))
    assert error.value.field == "--proxies"


@pytest.mark.parametrize(
    "origin", ["https://a.example", "http://localhost:*", "https://*.a.example:8443", "http://192.0.2.1", "HTTPS://A"]
)
def test_an_origin_may_frame_the_page(origin):
    assert Settings(frames=(origin,)).frames == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        "*", "https://*", "https://*.example", "https://a.*.example", "notebook.example", "file://x", "data:", "'none'",
        "https://a.example/path", "https://a.example; script-src *", "https://a.example\r\nX: y", "https://a.example\n",
        "https://a.example b.c", "https://a.example,https://b.example", "https://u@a.example", "https://a.example:",
        "https://", "",
    ],
)  # fmt: skip
def test_anything_else_may_not(origin):
    with pytest.raises(WebError) as error:
        Settings(frames=(origin,))
    assert error.value.field == "--frames"
