"""Command line of cib_jax: python -m cib_jax --config=NAME --workdir=DIR.

Fields of the experiment are set by --config.FIELD=VALUE, such as
--config.bits=64; cib_jax/configs/default.py lists all of them with their meaning.
"""

import sys

from cib_jax.cli import python_check

if __name__ == "__main__":
    sys.argv[0] = "cib_jax"
    python_check.handle_early_signals()
    python_check.check_python()
    from cib_jax.cli.main import start

    start()
