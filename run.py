"""The one door: `python run.py --config=configs/NAME.py --workdir=DIR --mode=train`; fields by --config.FIELD=VALUE."""

from cib_jax.command import interpreter

if __name__ == "__main__":
    interpreter.check()
    from cib_jax.command.door import start

    start()
