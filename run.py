"""The one door: `python run.py --config=configs/NAME.py --workdir=DIR --mode=train`; fields by --config.FIELD=VALUE."""

import difflib
import importlib
import itertools
import os
import pathlib
import re
import runpy
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

HERE = pathlib.Path(__file__).resolve().parent
DEFAULT_CONFIG = str(HERE / "configs" / "digits.py")
INDEX_CONFIG = str(HERE / "configs" / "index.py")
"""By which --mode=index learns where no --config is given."""

# Its default is given in `parse`: here it would read the fields' overrides, and fail, before anything can be told.
_CONFIG = config_flags.DEFINE_config_file("config", None, f"The experiment's file; by default {DEFAULT_CONFIG}.")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The run's folder; by default a new one under runs/. index: the trained run whose encoder is taken.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "compare", "tune", "encode", "index", "search", "duplicates", "serve"],
    "train (and then evaluate); evaluate a trained run; compare methods, code lengths and "
    "seeds; tune hyper-parameters; encode a corpus with a trained run; index photos for searching; search an index; "
    "find near duplicates in it; serve a page to search it.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "train, evaluate: HOST:PORT of the first of several processes that share one run, given to all of them.",
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "train, evaluate, encode: how many processes there are; by default as srun or mpirun says, or 1."
)
_PROCESS = flags.DEFINE_integer("process", None, "train, evaluate, encode: which of them this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "train, evaluate: refuses to run alone; the other processes are those that a TPU pod, SLURM or Open MPI tells of.",
)
_IMAGES = flags.DEFINE_string(
    "images", None, "index, encode: a folder of photos, a .csv or .parquet list of them; encode: or a .npy of features."
)
_CODES = flags.DEFINE_string("codes", None, "encode: the folder for the codes.")
_PART = flags.DEFINE_integer("part", 8192, "encode: files in a part, which one process makes.")

_INDEX = flags.DEFINE_string(
    "index", None, "index, search, duplicates, serve: the index: a folder, or s3://, gs://, az:// or db:// of LanceDB."
)
_QUERY = flags.DEFINE_string("query", None, "search: a photo, or a folder of photos.")
_K = flags.DEFINE_integer("k", None, "search: how many photos to each query; by default 20, with --radius all.")
_RADIUS = flags.DEFINE_integer(
    "radius", None, "search, duplicates: in how many bits photos may differ; duplicates: by default a sixteenth."
)
_KIND = flags.DEFINE_string(
    "kind", "exact", "search: exact, or approximately by hnsw, ivf or mih; settings follow it: --kind='ivf nprobe=64'."
)
_RERANK = flags.DEFINE_bool("rerank", False, "search: orders the first 100 hits, or k, anew by the query's logits.")
_CONFIRM = flags.DEFINE_bool(
    "confirm", True, "duplicates: False groups photos of like things, too, not only copies of one picture."
)
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "search, duplicates: json prints a line for each.")
_SHOW = flags.DEFINE_string(
    "show", None, "search, duplicates: a contact sheet, --show=FILE.png; --show alone: search.png or duplicates.png."
)

_HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: the address to listen at; 0.0.0.0 is all of this machine.")
_PORT = flags.DEFINE_integer("port", 7860, "serve: the port; 0 takes a free one.")
_NAMES = flags.DEFINE_list(
    "names", [], "serve: on a network, names that a browser may ask it by, such as photos.example.org; '*': any."
)
_PROXIES = flags.DEFINE_list("proxies", [], "serve: addresses of reverse proxies, whose X-Forwarded-For is believed.")
_BELOW = flags.DEFINE_string("below", "", "serve: the folder, such as /photos, that a reverse proxy serves it under.")
_SEARCHES = flags.DEFINE_integer("searches", 120, "serve: searches of one client a minute.")
_PHOTO_MB = flags.DEFINE_integer("photo_mb", 20, "serve: largest photo that is taken, in millions of bytes.")
_MEGAPIXELS = flags.DEFINE_integer("megapixels", 50, "serve: largest photo that is taken, in millions of pixels.")

FLAGS_OF = {
    "train": ("workdir", "coordinator", "processes", "process", "distributed"),
    "evaluate": ("workdir", "coordinator", "processes", "process", "distributed"),
    "compare": ("workdir",),
    "tune": ("workdir",),
    "encode": ("workdir", "processes", "process", "images", "codes", "part"),
    "index": ("workdir", "images", "index"),
    "search": ("index", "query", "k", "radius", "kind", "rerank", "format", "show"),
    "duplicates": ("index", "radius", "confirm", "format", "show"),
    "serve": ("index", "host", "port", "names", "proxies", "below", "searches", "photo_mb", "megapixels"),
}
"""Flags that a mode takes besides --config and --mode.

A comparison's processes and a search's need none: each takes what nobody else is at.
"""


BEGINNING = ("train", "compare", "tune")
"""Modes that begin something: jobs of the same name, each a function of the config and the workdir."""


def refuse(message: str) -> NoReturn:
    """Ends the program for a user's mistake: one sentence, no traceback."""
    print(f"run.py: {message}", file=sys.stderr)
    sys.exit(2)


def parse(arguments: Sequence[str]) -> list[str]:
    """Reads the flags and returns the program's name and the --config given, if any.

    A mistake in them ends the program with one sentence that names the flag.
    """
    path, others = _without_config(arguments)
    default = INDEX_CONFIG if _mode_of(others) == "index" else DEFAULT_CONFIG
    others = list(_with_show_named(others))
    _check_fields(path or default, arguments)
    # First of all, wherever the user put it: its fields can be set only once it is read.
    # ml_collections looks for the fields in sys.argv itself.
    sys.argv[:] = [others[0], f"--config={path or default}", *others[1:]]
    try:
        rest = flags.FLAGS(sys.argv)
    except (flags.Error, ValueError, TypeError) as error:
        refuse(str(error).strip().splitlines()[0])
    if len(rest) > 1:
        refuse(f"{rest[1]!r} is no flag; flags start with --, such as --config.bits=64")
    return [rest[0], *([path] if path else [])]


def _mode_of(arguments: Sequence[str]) -> str:
    mode = "train"
    for argument, after in itertools.pairwise([*arguments, ""]):
        match = re.fullmatch(r"--?mode(?:=(.*))?", argument)
        if match:
            mode = match.group(1) if match.group(1) is not None else after
    return mode


def _with_show_named(arguments: Sequence[str]) -> Iterator[str]:
    """Yields the arguments, with a name for the contact sheet where --show has none."""
    for argument, after in itertools.pairwise([*arguments, "--"]):
        unnamed = argument in ("--show", "-show") and after.startswith("-")
        yield f"--show={_mode_of(arguments)}.png" if unnamed else argument


def _without_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the last --config given, None if there is none, and the other arguments."""
    path, others, waiting = None, [], False
    for argument in arguments:
        match = re.fullmatch(r"--?config(?:=(.*))?", argument)
        if waiting or (match and match.group(1) is not None):
            path = match.group(1) if match and not waiting else argument
            waiting = False
        elif match:
            waiting = True
        else:
            others.append(argument)
    if waiting:
        refuse("--config: it wants the path of an experiment, such as --config=configs/cifar.py")
    return path, others


def _check_fields(path: str, arguments: Sequence[str]) -> None:
    """Refuses a config file that cannot be read, and fields that it does not have."""
    from cib_jax.config import flatten

    try:
        fields = flatten(runpy.run_path(path)["get_config"]())
    except FileNotFoundError:
        known = ", ".join(sorted(str(file.relative_to(HERE)) for file in (HERE / "configs").glob("[!_]*.py")))
        refuse(f"--config: there is no file {path!r}; experiments here: {known}")
    except Exception as error:  # it is the user's own Python file: anything may go wrong in it
        refuse(f"--config: {path!r} is no experiment with a get_config() ({type(error).__name__}: {error})")
    groups = {name.rpartition(".")[0] for name in fields} - {""}
    for argument in arguments[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if not match or match.group(1) in fields:
            continue
        name = match.group(1)
        if name in groups:
            refuse(f"--config.{name}: it is a group; set one of its fields, such as {_first_of(fields, name)}")
        near = [full for full in fields if full.endswith("." + name)] or difflib.get_close_matches(name, fields, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        refuse(f"--config.{name}: there is no such field; {hint}Fields: {', '.join(sorted(fields))}")


def _first_of(fields: dict, group: str) -> str:
    return next(name for name in fields if name.startswith(group + "."))


def keep_compilations() -> None:
    """Turns on JAX's persistent compilation cache, unless the environment names one: a second run starts sooner."""
    import jax

    from cib_jax import feature_cache

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(feature_cache.home() / "jax"))
        # JAX's second leaves out programs that take longer together than those it keeps.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def main(arguments: Sequence[str]) -> None:
    """Starts one job; `arguments` are what `parse` returned."""
    logging.set_verbosity(logging.FATAL)  # Orbax, TFDS and Grain tell much that no user asked for, errors included
    mode = _MODE.value
    begins = mode in BEGINNING
    if _WORKDIR.value == "":
        refuse("--workdir: it is empty; name a folder, or leave the flag out for a new one under runs/")
    for name in sorted({name for names in FLAGS_OF.values() for name in names} - {*FLAGS_OF.get(mode, ())}):
        if flags.FLAGS[name].present:
            *others, last = (f"--mode={other}" for other, names in FLAGS_OF.items() if name in names)
            modes = f"{', '.join(others)} and {last}" if others else last
            refuse(f"--{name}: it is for {modes}; leave it out of --mode={mode}")
    if mode in ("evaluate", "encode") and _WORKDIR.value is None:
        refuse(f"--workdir: --mode={mode} wants the folder of a trained run; give --workdir=DIR")
    if "index" in FLAGS_OF[mode]:
        check_index(mode, _WORKDIR.value, config_named=bool(arguments[1:]))

    # Only now, so that a mistake in the flags is told at once.
    from cib_jax import rendezvous
    from cib_jax.jobs import endings, preemption
    from cib_jax.jobs.workdir import default_name

    endings.quieten_background()
    workdir = pathlib.Path(_WORKDIR.value).expanduser() if _WORKDIR.value else None
    if begins and workdir is None:
        workdir = default_name(_CONFIG.value, mode)
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
    with endings.in_words(goes_on, _WORKDIR.value or ""):
        if "coordinator" in FLAGS_OF.get(mode, ()):
            join(mode)
        rendezvous.check_alone()
        preemption.listen()
        if begins:
            getattr(importlib.import_module(f"cib_jax.jobs.{mode}"), mode)(_CONFIG.value, workdir)
        elif "index" in FLAGS_OF[mode]:
            look_up(mode, workdir, config_named=bool(arguments[1:]))
        else:
            use(mode, workdir, config_named=bool(arguments[1:]))


def join(mode: str) -> None:
    """Has this process work together with others where the flags or the environment tell of some."""
    import jax

    from cib_jax import processes, rendezvous
    from cib_jax.config import WHERE, flatten
    from cib_jax.jobs import endings

    def tell(words: str) -> None:
        print(f"run.py: {words}", file=sys.stderr, flush=True)

    rendezvous.join(_COORDINATOR.value, _PROCESS.value, _PROCESSES.value, detect=_DISTRIBUTED.value, tell=tell)
    if processes.several():
        if not processes.first():
            tell(f"process {jax.process_index()} of {jax.process_count()} has joined; the first one reports")
        if not _WORKDIR.value:
            raise processes.ProcessesError("--workdir: several processes need one folder; give it to all of them")
        if processes.first():
            endings.forget(_WORKDIR.value)
        fields = {f"--config.{name}": value for name, value in flatten(_CONFIG.value).items() if name not in WHERE}
        processes.check_alike({"--mode": mode, "--workdir": _WORKDIR.value} | fields)
        endings.watch(_WORKDIR.value)


def use(mode: str, workdir: pathlib.Path, *, config_named: bool) -> None:
    """Starts a job on a trained run, whose config is its own."""
    from cib_jax import rendezvous
    from cib_jax.config import flatten
    from cib_jax.jobs.encode import encode
    from cib_jax.jobs.evaluate import evaluate

    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    if config_named:  # of an experiment named beside the run, what says which run this is must agree
        overrides = {name: flatten(_CONFIG.value)[name] for name in ("data.name", "backbone")} | overrides
    if mode == "evaluate":
        evaluate(workdir, overrides=overrides)
        return
    if not _CODES.value:
        refuse("--codes: --mode=encode wants a folder for the codes; give --codes=DIR")
    place = rendezvous.place(_PROCESS.value, _PROCESSES.value)
    encode(workdir, _IMAGES.value, _CODES.value, part=_PART.value, place=place, overrides=overrides)


def check_index(mode: str, workdir: pathlib.Path | None, *, config_named: bool) -> None:
    """Refuses a job on an index whose flags cannot work."""
    if not _INDEX.value:
        refuse(f"--index: --mode={mode} wants the index; give its folder, --index=DIR")
    if mode != "index" and (config_named or config_flags.get_override_values(flags.FLAGS["config"])):
        refuse(f"--config: an index has its own encoder; leave --config and its fields out of --mode={mode}")
    if workdir and config_named:
        refuse(f"--config: the encoder in {workdir} is trained already; leave --config or --workdir out")
    if mode == "search" and not _QUERY.value:
        refuse("--query: --mode=search wants a photo or a folder of photos; give --query=FILE")


def look_up(mode: str, workdir: pathlib.Path | None, *, config_named: bool) -> None:
    """Starts a job on an index."""
    place = _INDEX.value
    if mode == "index":
        from cib_jax.config import flatten
        from cib_jax.jobs.index import index

        overrides = config_flags.get_override_values(flags.FLAGS["config"])
        if config_named:  # all of it was asked for
            overrides = flatten(_CONFIG.value)
        index(place, _IMAGES.value, workdir=workdir, config=_CONFIG.value, overrides=overrides)
    elif mode == "duplicates":
        from cib_jax.jobs.duplicates import duplicates

        duplicates(place, radius=_RADIUS.value, confirm=_CONFIRM.value, form=_FORMAT.value, show=_SHOW.value)
    elif mode == "serve":
        from cib_jax.jobs.serve import serve

        serve(
            place,
            host=_HOST.value,
            port=_PORT.value,
            below=_BELOW.value,
            hosts=tuple(_NAMES.value),
            proxies=tuple(_PROXIES.value),
            searches=_SEARCHES.value,
            photo_mb=_PHOTO_MB.value,
            megapixels=_MEGAPIXELS.value,
        )
    elif mode == "search":
        from cib_jax.jobs.search import search
        from cib_jax.retrieval.index import kind_of

        kind, settings = kind_of(_KIND.value)
        search(
            place,
            _QUERY.value,
            k=_K.value,
            radius=_RADIUS.value,
            kind=kind,
            settings=settings,
            rerank=_RERANK.value,
            form=_FORMAT.value,
            show=_SHOW.value,
        )


def end_early(*_: object) -> NoReturn:
    """Ends the program on SIGTERM while nothing is begun."""
    os.write(2, b"run.py: Stopped by SIGTERM before anything began; the same command starts again.\n")
    os._exit(75)  # as `preemption.CODE`, which is not imported yet


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_early)
    app.run(main, flags_parser=parse)
