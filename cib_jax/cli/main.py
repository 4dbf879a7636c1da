"""Entry point of the command line: validates the flags, then starts the command of the mode."""

import atexit
import gc
import importlib
import pathlib
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from cib_jax import console
from cib_jax.cli import python_check
from cib_jax.cli.flags import CONFIG, COORDINATOR, DISTRIBUTED, MODE, MODES, PROCESS, PROCESSES, STARTING, WORKDIR
from cib_jax.cli.parsing import parse
from cib_jax.config import flatten, own_fields
from cib_jax.console import exit_with_error
from cib_jax.files import REINSTALL, first_line, short_reason
from cib_jax.hint import HINT, LOADING

MAX_COMPILED_BYTES = 2 << 30
"""Bound at each start for the compiled programs that are kept."""


def start() -> None:
    """Starts the program."""
    console.replace_unprintable()
    atexit.register(gc.freeze)  # last of all: Python's own collection at the end visits every object, for seconds
    for flag in flags.FLAGS.get_flags_for_module("cib_jax.cli.flags"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # --help lists only these
    try:
        app.run(main, flags_parser=parse)
    finally:
        HINT.clear()  # before a traceback


def main(arguments: Sequence[str]) -> None:
    """Runs one command; `arguments` is the result of `parse`."""
    try:
        _run(arguments)
    except (ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, ImportError) and not (error.name or "").startswith("cib_jax"):
            exit_with_error(f"a library cannot be loaded ({first_line(error)}); {REINSTALL}")
        # JAX reports the memory of a device, and Python that of a thread, in errors without a class of their own.
        if isinstance(error, MemoryError) or str(error).startswith(("RESOURCE_EXHAUSTED", "can't start new thread")):
            exit_with_error(
                f"memory is exhausted ({first_line(error)}); end other programs, raise a limit (ulimit -v) or, in "
                "training, choose a smaller --config.batch_size"
            )
        raise


def _run(arguments: Sequence[str]) -> None:
    logging.set_verbosity(logging.FATAL)  # messages of Orbax, TFDS and Grain that are not meant for users
    name, mode, config_given = MODE.value, MODES[MODE.value], len(arguments) > 1
    validate_flags(name, config_given)

    HINT.show(LOADING)
    # Imported only now, so that mistakes in the flags are reported at once.
    from cib_jax.distributed import initialize, multihost
    from cib_jax.runs import processes

    module, function = mode.command.split(".")
    command = getattr(importlib.import_module(f"cib_jax.commands.{module}"), function)
    processes.install_background_hooks()
    workdir = pathlib.Path(WORKDIR.value).expanduser() if WORKDIR.value else None
    if name in STARTING and workdir is None:
        from cib_jax.runs.workdir import default_name

        workdir = default_name(CONFIG.value, name)
    use_compilation_cache()
    if signal.getsignal(signal.SIGINT) is python_check.end_early:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    after_interrupt = mode.after_interrupt.format(mode=name, workdir=workdir)
    with processes.exit_on_error(after_interrupt, WORKDIR.value or ""):
        if "coordinator" in mode.flags:
            join_processes(name)
        else:
            initialize.set_up_devices(_print_error)
        initialize.validate_single_process()
        multihost.install_sigterm_handler()
        command(**command_arguments(name, workdir, config_given))
        sys.stdout.flush()


def validate_flags(name: str, config_given: bool) -> None:
    """Ends the program if a flag does not belong to the mode, or if a required one is missing."""
    if WORKDIR.value == "":
        exit_with_error("--workdir: the value is empty; name a folder, or omit the flag for a new one under runs/")
    mode = MODES[name]
    for flag in sorted({flag for other in MODES.values() for flag in other.flags} - {*mode.flags}):
        if flags.FLAGS[flag].present:
            modes = [f"--mode={other}" for other in MODES if flag in MODES[other].flags]
            exit_with_error(f"--{flag}: this flag is for {' and '.join(modes)}; omit it with --mode={name}")
    for flag in mode.required:
        if not flags.FLAGS[flag].value:
            meaning = flags.FLAGS[flag].help.partition(": ")[2].rstrip(".")
            exit_with_error(
                f"--{flag}: missing, but required by --mode={name}; give the {meaning.removeprefix('the ')}"
            )
    if name == "evaluate" and bool(WORKDIR.value) == bool(flags.FLAGS["codes"].value):
        exit_with_error("--workdir: --mode=evaluate needs the folder of a run, or the file of --codes instead of it")
    config_given = config_given and not own_fields  # a file of a user's own parts may have the encoder's backbone
    query = pathlib.Path((name == "search" and flags.FLAGS["query"].value) or "").expanduser()
    if query.is_absolute() and not query.exists():  # a relative one may be the path of an indexed photo
        exit_with_error(f"--query: there is no file {query}; give a photo or a folder of photos")
    if name in ("search", "duplicates", "serve") and (config_given or _overrides()):
        exit_with_error(f"--config: an index has its own encoder; omit --config and its fields with --mode={name}")
    if name == "index" and WORKDIR.value and config_given:
        exit_with_error(f"--config: the encoder in {WORKDIR.value} is already trained; omit --config or --workdir")


def command_arguments(name: str, workdir: pathlib.Path | None, config_given: bool) -> dict[str, Any]:
    """Returns the keyword arguments of a mode's command."""
    if name in STARTING:
        return {"config": CONFIG.value, "workdir": workdir}
    joining = {"coordinator", "distributed"} | ({"process", "processes"} if name == "evaluate" else set())
    arguments = {flag: flags.FLAGS[flag].value for flag in MODES[name].flags if flag not in joining}
    if "workdir" in arguments:
        arguments.update(workdir=workdir, overrides=_overrides())
    if name == "index":
        arguments["config"] = CONFIG.value
        if config_given and workdir is None:  # every field of the experiment was asked for
            arguments["overrides"] = flatten(CONFIG.value)
    elif config_given and "overrides" in arguments:
        # An experiment given beside a trained run must agree in the fields that identify the run.
        identity = {field: flatten(CONFIG.value)[field] for field in ("data.name", "backbone")}
        arguments["overrides"] = {**identity, **_overrides()}
    return arguments


def _overrides() -> dict[str, Any]:
    return config_flags.get_override_values(flags.FLAGS["config"]) or {}


def join_processes(name: str) -> None:
    """Joins the processes of one run, as given by flags or by the environment, and checks that they agree."""
    import jax

    from cib_jax import errors
    from cib_jax.config.schema import WHERE
    from cib_jax.distributed import initialize, multihost
    from cib_jax.runs import processes

    initialize.initialize(
        COORDINATOR.value, PROCESS.value, PROCESSES.value, detect=DISTRIBUTED.value, report=_print_error
    )
    initialize.set_up_devices(_print_error)
    if multihost.is_distributed():
        if not multihost.is_first_process():
            _print_error(f"process {jax.process_index()} of {jax.process_count()} has joined; the first one reports")
        if not WORKDIR.value:
            raise errors.DistributedError(
                "--workdir: several processes need one folder; give the same to all of them", "--workdir"
            )
        if multihost.is_first_process():
            processes.remove_last_words(WORKDIR.value)
        fields = {f"--config.{field}": value for field, value in flatten(CONFIG.value).items() if field not in WHERE}
        multihost.validate_alike({"--mode": name, "--workdir": WORKDIR.value} | fields)
        processes.end_with_peers(WORKDIR.value)


def use_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache: a second run starts sooner. The environment may name its folder."""
    import jax

    from cib_jax.data import cache
    from cib_jax.runs import processes

    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache.home() / "compiled"
        shutil.rmtree(cache.home() / "jax", ignore_errors=True)  # of earlier versions, without bound and checksums
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            cache.remove_oldest_files(folder, MAX_COMPILED_BYTES)
        except OSError as error:
            _print_error(f"{folder} cannot be written ({short_reason(error)}), so programs are compiled at each start")
            return
        processes.set_compilation_cache(str(folder))
        # By default, programs that compile in less than a second are not kept, which together take longest.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # JAX would warn for each program, such as when the disk gets full. Without the cache, results are the same.
    warnings.filterwarnings("ignore", "Error (read|writ)ing persistent compilation cache")


def _print_error(message: str) -> None:
    console.print_error(console.with_program_name(message))
