"""Search page and JSON API of a photo index, served over HTTP."""

import importlib.util

from cib_jax.errors import WebError
from cib_jax.files import install_command


def check_installed() -> None:
    """Checks that the packages of the extra `web` are installed.

    Raises:
      WebError: A package is missing.
    """
    for package in ("fastapi", "gradio", "python_multipart", "starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise WebError(
                f"--mode=serve needs the package {package}, which is not installed; {install_command('web')}",
                field="--mode",
            )
