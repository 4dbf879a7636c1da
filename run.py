"""Command line of cib_jax: python run.py --config=NAME --workdir=DIR --mode=train.

Fields of the experiment are set by --config.FIELD=VALUE, such as
--config.bits=64; configs/default.py lists all of them with their meaning.
"""

from cib_jax.cli import python_check

if __name__ == "__main__":
    python_check.handle_early_signals()
    python_check.check_python()
    from cib_jax.hint import HINT, LOADING

    HINT.show(LOADING)
    from cib_jax.cli.main import start

    start()
