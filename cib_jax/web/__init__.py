"""Search page and JSON API of a photo index, served over HTTP."""

from cib_jax.errors import WebError
from cib_jax.files import install_command, is_installed


def check_installed() -> None:
    """Checks that the packages of the extra `web` are installed.

    Raises:
      WebError: A package is missing.
    """
    for package in ("fastapi", "gradio", "python_multipart", "starlette", "uvicorn"):
        if not is_installed(package):
            raise WebError(
                f"--mode=serve needs the package {package}, which is not installed; {install_command('web')}",
                field="--mode",
            )
