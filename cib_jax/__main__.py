"""Command line of cib_jax, once installed: cib-jax MODE --config=NAME, or python -m cib_jax."""

import os
import sys

from cib_jax.cli import python_check


def main() -> None:
    """Runs the program."""
    # The name as the user called it, for messages.
    sys.argv[0] = "cib-jax" if os.path.basename(sys.argv[0]) == "cib-jax" else "python -m cib_jax"
    python_check.handle_early_signals()
    python_check.check_python()
    from cib_jax.hint import HINT, LOADING

    HINT.show(LOADING)
    from cib_jax.cli.main import start

    start()


if __name__ == "__main__":
    main()
