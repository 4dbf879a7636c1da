"""An index on a network: answers in JSON, the photos behind them, and what keeps both from harm."""

import importlib.util

from cib_jax.errors import UserError


class WebError(UserError):
    """What a server is made of is not installed."""


def check_installed() -> None:
    """Checks that the packages of the extra `web` are there.

    Raises:
      WebError: one is not.
    """
    for package in ("fastapi", "gradio", "limits", "python_multipart", "starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise WebError(f"--mode=serve: the package {package} is not installed; pip install 'cib-jax[web]'")
