"""The one door: flags in, one job out; a user's mistake told in one sentence."""

import importlib
import pathlib
import signal
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from cib_jax import program
from cib_jax.command import flags as given
from cib_jax.command import interpreter, modes
from cib_jax.command.parsing import parse
from cib_jax.program import refuse

LOADING = "Loading JAX and what else is needed; the first start takes longest"


def keep_compilations() -> None:
    """Turns on JAX's persistent compilation cache, unless the environment names one: a second run starts sooner."""
    import jax

    from cib_jax.jobs import feature_cache

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(feature_cache.home() / "jax"))
        # JAX's second leaves out programs that take longer together than those it keeps.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def main(arguments: Sequence[str]) -> None:
    """Starts one job; `arguments` are what `parse` returned."""
    logging.set_verbosity(logging.FATAL)  # Orbax, TFDS and Grain tell much that no user asked for, errors included
    mode = given.MODE.value
    begins = mode in given.BEGINNING
    if given.WORKDIR.value == "":
        refuse("--workdir: it is empty; name a folder, or leave the flag out for a new one under runs/")
    for name in sorted({name for names in given.FLAGS_OF.values() for name in names} - {*given.FLAGS_OF.get(mode, ())}):
        if flags.FLAGS[name].present:
            *others, last = (f"--mode={other}" for other, names in given.FLAGS_OF.items() if name in names)
            takers = f"{', '.join(others)} and {last}" if others else last
            refuse(f"--{name}: it is for {takers}; leave it out of --mode={mode}")
    workdir = pathlib.Path(given.WORKDIR.value).expanduser() if given.WORKDIR.value else None
    if mode in ("evaluate", "encode") and workdir is None:
        refuse(f"--workdir: --mode={mode} wants the folder of a trained run; give --workdir=DIR")
    if "index" in given.FLAGS_OF[mode]:
        modes.check_index(mode, workdir, config_named=bool(arguments[1:]))

    program.HINT.show(LOADING)
    # Only now, so that a mistake in the flags is told at once.
    from cib_jax.devices import available, rendezvous
    from cib_jax.jobs import endings, preemption
    from cib_jax.jobs.workdir import default_name

    job = getattr(importlib.import_module(f"cib_jax.jobs.{mode}"), mode)
    endings.quieten_background()
    if begins and workdir is None:
        workdir = default_name(given.CONFIG.value, mode)
    goes_on = {
        "train": f"--workdir={workdir} with the same config goes on from the last checkpoint",
        "evaluate": "the same command measures again",
        "encode": "the same command goes on after the parts that are there",
        "index": "the same command goes on with what is not indexed",
        "search": "the same command searches again",
        "duplicates": "the same command searches again",
        "serve": "the same command serves again",
    }.get(mode, f"--mode={mode} --workdir={workdir} with the same config goes on with what is not done")
    keep_compilations()
    if signal.getsignal(signal.SIGINT) is interpreter.end_early:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with endings.in_words(goes_on, given.WORKDIR.value or ""):
        if "coordinator" in given.FLAGS_OF.get(mode, ()):
            modes.join(mode)
        else:
            available.set_up(lambda words: program.tell(program.says(words)))
        rendezvous.check_alone()
        preemption.listen()
        if begins:
            job(given.CONFIG.value, workdir)
        elif "index" in given.FLAGS_OF[mode]:
            modes.look_up(mode, workdir, config_named=bool(arguments[1:]))
        else:
            assert workdir is not None  # it was refused above
            modes.use(mode, workdir, config_named=bool(arguments[1:]))


def start() -> None:
    """Starts the program, for the file that Python runs, whose docstring stands above --help."""
    program.HINT.show(LOADING)
    for flag in flags.FLAGS.get_flags_for_module(given.__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # --help tells of these alone
    app.run(main, flags_parser=parse)
