"""Which flags there are, and which of them a mode takes."""

from absl import flags
from ml_collections import config_flags

DEFAULT_CONFIG = "digits"
INDEX_CONFIG = "index"
"""By which --mode=index learns where no --config is given."""

# Its default is given in `parse`: here it would read the fields' overrides, and fail, before anything can be told.
CONFIG = config_flags.DEFINE_config_file(
    "config", None, f"The experiment: a name, such as cifar, or a file; by default {DEFAULT_CONFIG}."
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The run's folder; by default a new one under runs/. index: the trained run whose encoder is taken.",
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "compare", "tune", "encode", "index", "search", "duplicates", "serve"],
    "train (and then evaluate); evaluate a trained run; compare methods, code lengths and "
    "seeds; tune hyper-parameters; encode a corpus with a trained run; index photos for searching; search an index; "
    "find near duplicates in it; serve a page to search it.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "train, evaluate: HOST:PORT of the first of several processes that share one run, given to all of them.",
)
PROCESSES = flags.DEFINE_integer(
    "processes", None, "train, evaluate, encode: how many processes there are; by default as srun or mpirun says, or 1."
)
PROCESS = flags.DEFINE_integer("process", None, "train, evaluate, encode: which of them this is, from 0.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "train, evaluate: refuses to run alone; the other processes are those that a TPU pod, SLURM or Open MPI tells of.",
)
IMAGES = flags.DEFINE_string(
    "images", None, "index, encode: a folder of photos, a .csv or .parquet list of them; encode: or a .npy of features."
)
CODES = flags.DEFINE_string("codes", None, "encode: the folder for the codes.")
PART = flags.DEFINE_integer("part", 8192, "encode: files in a part, which one process makes.")

INDEX = flags.DEFINE_string(
    "index", None, "index, search, duplicates, serve: the index: a folder, or s3://, gs://, az:// or db:// of LanceDB."
)
QUERY = flags.DEFINE_string("query", None, "search: a photo, or a folder of photos.")
K = flags.DEFINE_integer("k", None, "search: how many photos to each query; by default 20, with --radius all.")
RADIUS = flags.DEFINE_integer(
    "radius", None, "search, duplicates: in how many bits photos may differ; duplicates: by default a sixteenth."
)
KIND = flags.DEFINE_string(
    "kind", "exact", "search: exact, or approximately by hnsw, ivf or mih; settings follow it: --kind='ivf nprobe=64'."
)
RERANK = flags.DEFINE_bool("rerank", False, "search: orders the first 100 hits, or k, anew by the query's logits.")
CONFIRM = flags.DEFINE_bool(
    "confirm", True, "duplicates: False groups photos of like things, too, not only copies of one picture."
)
FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "search, duplicates: json prints a line for each.")
SHOW = flags.DEFINE_string(
    "show", None, "search, duplicates: a contact sheet, --show=FILE.png; --show alone: search.png or duplicates.png."
)

HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: the address to listen at; 0.0.0.0 is all of this machine.")
PORT = flags.DEFINE_integer("port", 7860, "serve: the port; 0 takes a free one.")
NAMES = flags.DEFINE_list(
    "names", [], "serve: on a network, names that a browser may ask it by, such as photos.example.org; '*': any."
)
PROXIES = flags.DEFINE_list("proxies", [], "serve: addresses of reverse proxies, whose X-Forwarded-For is believed.")
FRAMES = flags.DEFINE_list(
    "frames",
    [],
    "serve: origins of pages that may show it in a frame, such as https://notebook.example.org or http://localhost:*.",
)
BELOW = flags.DEFINE_string("below", "", "serve: the folder, such as /photos, that a reverse proxy serves it under.")
SEARCHES = flags.DEFINE_integer("searches", 120, "serve: searches of one client a minute.")
PHOTO_MB = flags.DEFINE_integer("photo_mb", 20, "serve: largest photo that is taken, in millions of bytes.")
MEGAPIXELS = flags.DEFINE_integer("megapixels", 50, "serve: largest photo that is taken, in millions of pixels.")

FLAGS_OF = {
    "train": ("workdir", "coordinator", "processes", "process", "distributed"),
    "evaluate": ("workdir", "coordinator", "processes", "process", "distributed"),
    "compare": ("workdir",),
    "tune": ("workdir",),
    "encode": ("workdir", "processes", "process", "images", "codes", "part"),
    "index": ("workdir", "images", "index"),
    "search": ("index", "query", "k", "radius", "kind", "rerank", "format", "show"),
    "duplicates": ("index", "radius", "confirm", "format", "show"),
    "serve": ("index", "host", "port", "names", "proxies", "frames", "below", "searches", "photo_mb", "megapixels"),
}
"""Flags that a mode takes besides --config and --mode.

A comparison's processes and a search's need none: each takes what nobody else is at.
"""


BEGINNING = ("train", "compare", "tune")
"""Modes that begin something: jobs of the same name, each a function of the config and the workdir."""
