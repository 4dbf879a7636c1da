"""The one door, installed: python -m cib_jax --config=NAME --workdir=DIR.

Fields of the experiment are set by --config.FIELD=VALUE, such as
--config.bits=64; cib_jax/configs/default.py has them all, with their meaning.
"""

import sys

from cib_jax import console
from cib_jax.cli import python_check

if __name__ == "__main__":
    sys.argv[0] = console.INSTALLED
    python_check.listen()
    python_check.check_python()
    from cib_jax.cli.main import start

    start()
