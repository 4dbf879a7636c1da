"""The one door, installed: python -m cib_jax --config=NAME --workdir=DIR.

Fields of the experiment are set by --config.FIELD=VALUE, such as
--config.bits=64; cib_jax/configs/default.py has them all, with their meaning.
"""

import sys

from cib_jax import program
from cib_jax.command import interpreter

if __name__ == "__main__":
    sys.argv[0] = program.INSTALLED
    interpreter.listen()
    interpreter.check()
    from cib_jax.command.door import start

    start()
