"""Modes of the program, and its command-line flags."""

from typing import NamedTuple

from absl import flags
from ml_collections import config_flags

_CONTINUES = "--mode={mode} --workdir={workdir} with the same config continues with what is not done yet"


class Mode(NamedTuple):
    """A mode of the program: what it does, an example, its flags besides --config and --mode, advice after Ctrl-C.

    The command is a module and function in cib_jax.commands; its keyword arguments have the names of the flags.
    """

    command: str
    about: str
    example: str
    flags: tuple[str, ...]
    required: tuple[str, ...] = ()
    after_interrupt: str = "the same command starts again"


_RUN = ("workdir", "coordinator", "processes", "process", "distributed")

MODES = {
    "train": Mode(
        "train.train",
        "trains an encoder, and evaluates it",
        "--config=cifar --config.bits=64 --workdir=runs/cifar",
        _RUN,
        after_interrupt="--workdir={workdir} with the same config continues from what it has saved",
    ),
    "evaluate": Mode(
        "evaluate.evaluate",
        "evaluates a trained run again, or the codes of any model",
        "--workdir=runs/cifar --config.k=100",
        (*_RUN, "codes"),
    ),
    "compare": Mode(
        "compare.compare",
        "compares methods, code lengths and seeds",
        '--config=cifar --config.compare.methods="itq, cibhash" --workdir=runs/table',
        ("workdir",),
        after_interrupt=_CONTINUES,
    ),
    "tune": Mode(
        "tune.tune",
        "tunes hyperparameters",
        '--config=cifar --config.tune.space="temperature=0.2..0.5"',
        ("workdir",),
        after_interrupt=_CONTINUES,
    ),
    "encode": Mode(
        "encode.encode",
        "encodes many files with a trained run",
        "--workdir=runs/photos --images=PHOTOS --codes=CODES",
        ("workdir", "processes", "process", "images", "exclude", "codes", "part"),
        required=("workdir", "codes"),
        after_interrupt="the same command continues after the parts that are complete",
    ),
    "index": Mode(
        "index.index",
        "indexes photos for search",
        "--images=PHOTOS --index=INDEX",
        ("workdir", "images", "exclude", "index", "relearn"),
        required=("index",),
        after_interrupt="the same command continues with what is not indexed yet",
    ),
    "search": Mode(
        "search.search",
        "searches an index",
        "--index=INDEX --query=PHOTO.jpg --k=10 --show",
        ("index", "query", "k", "radius", "kind", "rerank", "folder", "after", "before", "format", "show"),
        required=("index", "query"),
    ),
    "duplicates": Mode(
        "duplicates.duplicates",
        "finds copies of pictures in an index",
        "--index=INDEX --show",
        ("index", "radius", "confirm", "reference", "format", "show"),
        required=("index",),
    ),
    "serve": Mode(
        "serve.serve",
        "serves a search page",
        "--index=INDEX --port=7860",
        ("index", "host", "port", "names", "proxies", "frames", "below", "searches", "photo_mb", "megapixels"),
        required=("index",),
    ),
}

STARTING = ("train", "compare", "tune")
"""Modes that start something new: functions of the config and the workdir."""

DEFAULT_CONFIG = "digits"
INDEX_CONFIG = "index"
"""The experiment with which --mode=index trains an encoder if no --config is given."""

# `parse` sets the default: a default here would read the overrides of fields, and fail, before errors can be reported.
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    f"The experiment: a name, such as cifar, or a file; by default {DEFAULT_CONFIG}, for index {INDEX_CONFIG}.",
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; by default a new one under runs/. index: trained run whose encoder is used.",
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    [*MODES],
    "What to do; the first word of the command line may name it instead.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "train, evaluate: HOST:PORT of the first of several processes that share one run; the same value for all of them.",
)
PROCESSES = flags.DEFINE_integer(
    "processes", None, "train, evaluate, encode: number of processes; by default that of srun or mpirun, or 1."
)
PROCESS = flags.DEFINE_integer("process", None, "train, evaluate, encode: number of this process, from 0.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "train, evaluate: fail if alone; other processes are detected on a TPU pod, under SLURM or Open MPI.",
)
IMAGES = flags.DEFINE_string(
    "images",
    None,
    "index, encode: folder of photos, or .csv or .parquet list of them; encode: also a .npy file of features.",
)
EXCLUDE = flags.DEFINE_multi_string(
    "exclude",
    None,
    "index, encode: leave out files and folders that match a pattern: by name, such as '*.png', or by path in the "
    "folder of photos, such as '2020/*'. May be given several times. index: kept for later updates.",
)
CODES = flags.DEFINE_string(
    "codes",
    None,
    "encode: output folder of the codes. evaluate: .npz file of any model's query_codes, database_codes, query_labels "
    "and database_labels, in place of --workdir.",
)
PART = flags.DEFINE_integer("part", 8192, "encode: files per part; each part is made by one process.")

INDEX = flags.DEFINE_string(
    "index",
    None,
    "index, search, duplicates, serve: the index, a folder or an s3://, gs://, az:// or db:// address of LanceDB.",
)
RELEARN = flags.DEFINE_bool(
    "relearn", False, "index: learn the encoder anew from the photos that are there now, and encode them all again."
)
QUERY = flags.DEFINE_string("query", None, "search: photo, or folder of photos; or a path that a search has printed.")
K = flags.DEFINE_integer("k", None, "search: number of results per query; by default 20, with --radius all.")
RADIUS = flags.DEFINE_integer("radius", None, "search, duplicates: maximum Hamming distance in bits.")
KIND = flags.DEFINE_string(
    "kind", "exact", "search: exact, or the approximate hnsw, ivf or mih, with settings: --kind='ivf nprobe=64'."
)
RERANK = flags.DEFINE_bool("rerank", False, "search: order the first 500 results, or k, by the network's features.")
FOLDER = flags.DEFINE_string("folder", "", "search: only photos in this folder of the index, and in its subfolders.")
AFTER = flags.DEFINE_string(
    "after", "", "search: only photos whose files were last changed on this day or later: 2024-12-31, 2024-12 or 2024."
)
BEFORE = flags.DEFINE_string("before", "", "search: only photos whose files were last changed before this day.")
CONFIRM = flags.DEFINE_bool(
    "confirm", True, "duplicates: False also groups similar photos that are not copies of one picture."
)
REFERENCE = flags.DEFINE_string(
    "reference", None, "duplicates: folder of photos of which the index may hold copies; finds these alone."
)
FORMAT = flags.DEFINE_enum(
    "format",
    "table",
    ["table", "json", "csv"],
    "search: json prints a line per query; duplicates: json, csv per photo.",
)
SHOW = flags.DEFINE_string(
    "show",
    None,
    "search, duplicates: draw a contact sheet, --show=FILE.png; --show alone draws search.png or duplicates.png.",
)

HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: address to listen on; 0.0.0.0 for all of this machine.")
PORT = flags.DEFINE_integer("port", 7860, "serve: port; 0 for a free one.")
NAMES = flags.DEFINE_list(
    "names",
    [],
    "serve: host names under which browsers may reach it on a network, such as photos.example.org; '*' for any.",
)
PROXIES = flags.DEFINE_list(
    "proxies", [], "serve: addresses of reverse proxies whose X-Forwarded-For header is trusted."
)
FRAMES = flags.DEFINE_list(
    "frames",
    [],
    "serve: origins of pages that may frame it, such as https://notebook.example.org or http://localhost:*.",
)
BELOW = flags.DEFINE_string("below", "", "serve: path prefix, such as /photos, under which a reverse proxy serves it.")
SEARCHES = flags.DEFINE_integer("searches", 120, "serve: searches per minute and client.")
PHOTO_MB = flags.DEFINE_integer("photo_mb", 20, "serve: largest accepted photo, in millions of bytes.")
MEGAPIXELS = flags.DEFINE_integer("megapixels", 50, "serve: largest accepted photo, in millions of pixels.")
