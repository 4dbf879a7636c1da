"""The one door: python run.py --config=NAME --workdir=DIR --mode=train.

Fields of the experiment are set by --config.FIELD=VALUE, such as
--config.bits=64; configs/default.py has them all, with their meaning.
"""

from cib_jax.command import interpreter

if __name__ == "__main__":
    interpreter.listen()
    interpreter.check()
    from cib_jax.command.door import start

    start()
