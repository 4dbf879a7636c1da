"""Command line of cib_jax, once installed: cib-jax MODE --config=NAME, or python -m cib_jax."""

import sys

from cib_jax.cli import python_check


def main() -> None:
    """Runs the program."""
    sys.argv[0] = "cib_jax"
    python_check.handle_early_signals()
    python_check.check_python()
    from cib_jax.cli.main import start

    start()


if __name__ == "__main__":
    main()
