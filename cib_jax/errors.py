"""The one kind of error that is written for a user to read."""


class Refusal(ValueError):  # noqa: N818 - it is no fault of the program
    """Something a user gave cannot be used: a sentence names the field or file, what is wrong and what to do.

    `run.py` prints it without a traceback, and so does a notebook; whoever calls the functions can catch it like any
    ValueError.

    Examples:
      >>> import cib_jax as cib
      >>> try:
      ...     cib.read_corpus("nowhere")
      ... except cib.Refusal as refusal:
      ...     print(str(refusal).partition(" (")[0])
      --codes: nowhere is no folder of a corpus's codes
    """

    def _render_traceback_(self) -> list[str]:
        """Returns what IPython prints in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class WebError(Refusal):
    """An invalid setting of the search page's server, or a missing package of the extra `web`."""

    def __init__(self, message: str = "", *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


UserError = Refusal
