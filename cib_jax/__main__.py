"""The one door, installed: `python -m cib_jax --config=NAME --workdir=DIR`; a field by --config.FIELD=VALUE."""

import sys

from cib_jax import program
from cib_jax.command import interpreter

if __name__ == "__main__":
    sys.argv[0] = program.INSTALLED
    interpreter.check()
    from cib_jax.command.door import start

    start()
