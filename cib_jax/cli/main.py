"""Each mode's job with what the flags say of it."""

import importlib
import pathlib
import signal
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from cib_jax import console
from cib_jax.cli import python_check
from cib_jax.cli.flags import (
    BEGINNING,
    BELOW,
    CODES,
    CONFIG,
    CONFIRM,
    COORDINATOR,
    DISTRIBUTED,
    FLAGS_OF,
    FORMAT,
    FRAMES,
    HOST,
    IMAGES,
    INDEX,
    KIND,
    MEGAPIXELS,
    MODE,
    NAMES,
    PART,
    PHOTO_MB,
    PORT,
    PROCESS,
    PROCESSES,
    PROXIES,
    QUERY,
    RADIUS,
    RERANK,
    SEARCHES,
    SHOW,
    WORKDIR,
    K,
    __name__,
)
from cib_jax.cli.parsing import parse
from cib_jax.console import exit_with_error

# command.modes: Each mode's job with what the flags say of it.


def join(mode: str) -> None:
    """Has this process work together with others where the flags or the environment tell of some."""
    import jax

    from cib_jax import errors
    from cib_jax.config import flatten
    from cib_jax.config.schema import WHERE
    from cib_jax.distributed import initialize, multihost
    from cib_jax.runs import processes

    def tell(words: str) -> None:
        console.print_error(console.with_program_name(words))

    initialize.initialize(COORDINATOR.value, PROCESS.value, PROCESSES.value, detect=DISTRIBUTED.value, tell=tell)
    initialize.set_up_devices(tell)
    if multihost.is_distributed():
        if not multihost.is_first_process():
            tell(f"process {jax.process_index()} of {jax.process_count()} has joined; the first one reports")
        if not WORKDIR.value:
            raise errors.DistributedError("--workdir: several processes need one folder; give it to all of them")
        if multihost.is_first_process():
            processes.remove_last_words(WORKDIR.value)
        fields = {f"--config.{name}": value for name, value in flatten(CONFIG.value).items() if name not in WHERE}
        multihost.validate_alike({"--mode": mode, "--workdir": WORKDIR.value} | fields)
        processes.end_with_peers(WORKDIR.value)


def use(mode: str, workdir: pathlib.Path, *, config_named: bool) -> None:
    """Starts a job on a trained run, whose config is its own."""
    from cib_jax.commands.encode import encode
    from cib_jax.commands.evaluate import evaluate
    from cib_jax.config import flatten
    from cib_jax.distributed import initialize

    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    if config_named:  # of an experiment named beside the run, what says which run this is must agree
        overrides = {name: flatten(CONFIG.value)[name] for name in ("data.name", "backbone")} | overrides
    if mode == "evaluate":
        evaluate(workdir, overrides=overrides)
        return
    if not CODES.value:
        exit_with_error("--codes: --mode=encode wants a folder for the codes; give --codes=DIR")
    place = initialize.process_place(PROCESS.value, PROCESSES.value)
    encode(workdir, IMAGES.value, CODES.value, part=PART.value, place=place, overrides=overrides)


def check_index(mode: str, workdir: pathlib.Path | None, *, config_named: bool) -> None:
    """Refuses a job on an index whose flags cannot work."""
    if not INDEX.value:
        exit_with_error(f"--index: --mode={mode} wants the index; give its folder, --index=DIR")
    if mode != "index" and (config_named or config_flags.get_override_values(flags.FLAGS["config"])):
        exit_with_error(f"--config: an index has its own encoder; leave --config and its fields out of --mode={mode}")
    if workdir and config_named:
        exit_with_error(f"--config: the encoder in {workdir} is trained already; leave --config or --workdir out")
    if mode == "search" and not QUERY.value:
        exit_with_error("--query: --mode=search wants a photo or a folder of photos; give --query=FILE")


def look_up(mode: str, workdir: pathlib.Path | None, *, config_named: bool) -> None:
    """Starts a job on an index."""
    place, query = INDEX.value or "", QUERY.value or ""  # refused by `check_index` where they are wanted
    if mode == "index":
        from cib_jax.commands.index import index
        from cib_jax.config import flatten

        overrides = config_flags.get_override_values(flags.FLAGS["config"])
        if config_named:  # all of it was asked for
            overrides = flatten(CONFIG.value)
        index(place, IMAGES.value, workdir=workdir, config=CONFIG.value, overrides=overrides)
    elif mode == "duplicates":
        from cib_jax.commands.search import duplicates

        duplicates(
            place,
            radius=RADIUS.value,
            confirm=CONFIRM.value,
            form=FORMAT.value,
            show=SHOW.value,
        )
    elif mode == "serve":
        from cib_jax.commands.serve import serve

        serve(
            place,
            host=HOST.value,
            port=PORT.value,
            below=BELOW.value,
            hosts=tuple(NAMES.value),
            proxies=tuple(PROXIES.value),
            frames=tuple(FRAMES.value),
            searches=SEARCHES.value,
            photo_mb=PHOTO_MB.value,
            megapixels=MEGAPIXELS.value,
        )
    elif mode == "search":
        from cib_jax.commands.search import search
        from cib_jax.retrieval.index import kind_of

        kind, settings = kind_of(KIND.value)
        search(
            place,
            query,
            k=K.value,
            radius=RADIUS.value,
            kind=kind,
            settings=settings,
            rerank=RERANK.value,
            form=FORMAT.value,
            show=SHOW.value,
        )


# command.door: The one door: flags in, one job out; a user's mistake told in one sentence.


LOADING = "Loading JAX and what else is needed; the first start takes longest"


def keep_compilations() -> None:
    """Turns on JAX's persistent compilation cache, unless the environment names one: a second run starts sooner."""
    import jax

    from cib_jax.data import cache

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache.home() / "jax"))
        # JAX's second leaves out programs that take longer together than those it keeps.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def main(arguments: Sequence[str]) -> None:
    """Starts one job; `arguments` are what `parse` returned."""
    logging.set_verbosity(logging.FATAL)  # Orbax, TFDS and Grain tell much that no user asked for, errors included
    mode = MODE.value
    begins = mode in BEGINNING
    if WORKDIR.value == "":
        exit_with_error("--workdir: it is empty; name a folder, or leave the flag out for a new one under runs/")
    for name in sorted({name for names in FLAGS_OF.values() for name in names} - {*FLAGS_OF.get(mode, ())}):
        if flags.FLAGS[name].present:
            *others, last = (f"--mode={other}" for other, names in FLAGS_OF.items() if name in names)
            takers = f"{', '.join(others)} and {last}" if others else last
            exit_with_error(f"--{name}: it is for {takers}; leave it out of --mode={mode}")
    workdir = pathlib.Path(WORKDIR.value).expanduser() if WORKDIR.value else None
    if mode in ("evaluate", "encode") and workdir is None:
        exit_with_error(f"--workdir: --mode={mode} wants the folder of a trained run; give --workdir=DIR")
    if "index" in FLAGS_OF[mode]:
        check_index(mode, workdir, config_named=bool(arguments[1:]))

    console.HINT.show(LOADING)
    # Only now, so that a mistake in the flags is told at once.
    from cib_jax.distributed import initialize, multihost
    from cib_jax.runs import processes
    from cib_jax.runs.workdir import default_name

    job = getattr(importlib.import_module(f"cib_jax.commands.{'search' if mode == 'duplicates' else mode}"), mode)
    processes.install_background_hooks()
    if begins and workdir is None:
        workdir = default_name(CONFIG.value, mode)
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
    if signal.getsignal(signal.SIGINT) is python_check.end_early:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with processes.exit_on_error(goes_on, WORKDIR.value or ""):
        if "coordinator" in FLAGS_OF.get(mode, ()):
            join(mode)
        else:
            initialize.set_up_devices(lambda words: console.print_error(console.with_program_name(words)))
        initialize.validate_single_process()
        multihost.install_sigterm_handler()
        if begins:
            job(CONFIG.value, workdir)
        elif "index" in FLAGS_OF[mode]:
            look_up(mode, workdir, config_named=bool(arguments[1:]))
        else:
            assert workdir is not None  # it was refused above
            use(mode, workdir, config_named=bool(arguments[1:]))


def start() -> None:
    """Starts the program, for the file that Python runs, whose docstring stands above --help."""
    console.HINT.show(LOADING)
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # --help tells of these alone
    app.run(main, flags_parser=parse)
