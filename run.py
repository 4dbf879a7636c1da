"""The one door: python run.py --config=NAME --workdir=DIR --mode=train.

Fields of the experiment are set by --config.FIELD=VALUE, such as
--config.bits=64; configs/default.py has them all, with their meaning.
"""

from cib_jax.cli import python_check

if __name__ == "__main__":
    python_check.listen()
    python_check.check_python()
    from cib_jax.cli.main import start

    start()
