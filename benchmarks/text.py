"""Hashing of text embeddings: search quality by bytes of a code, for this project, baselines and the float vectors.

`python -m benchmarks.text --data=wordnet.parquet` measures on a features file, such as one by `benchmarks.wordnet`, in
the splits and with the settings of configs/text.py. `--ask "fear of spiders"` prints instead the results for a text, by
codes and by floats; embedding the text needs `pip install '.[text]'`.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

import cib_jax as cib
from benchmarks import measuring, ranking, wordnet
from cib_jax.baselines import BASELINES
from cib_jax.config import build, schema
from cib_jax.data.dataset import ImageSet, gather
from cib_jax.errors import UserError
from configs import text

METHODS = {"lsh": "LSH", "itq": "ITQ", "cib": "cib_jax"}
NEAREST, AMONG = 10, 100
"""Recall is the share of the NEAREST neighbors by floats among the first AMONG by codes."""
ASKED = (
    "a vehicle with two wheels that you pedal",
    "fear of spiders",
    "lying awake at night",
    "a tool to open wine bottles",
    "a large bird that cannot fly",
)


class Task(NamedTuple):
    """Embeddings for training, queries and database, with labels of queries and database and the database's texts."""

    train: Float32[np.ndarray, "items features"]
    query: Float32[np.ndarray, "queries features"]
    database: Float32[np.ndarray, "n features"]
    query_labels: np.ndarray
    database_labels: np.ndarray
    texts: Sequence[str] | None


class Coded(NamedTuple):
    """Codes of a task by one method."""

    query: UInt8[np.ndarray, "queries bytes"]
    logits: Float[np.ndarray, "queries bits"]
    database: UInt8[np.ndarray, "n bytes"]


class Quality(NamedTuple):
    """MAP, and recall of the nearest by floats, of codes without and with re-ranking by logits."""

    map: float
    reranked_map: float
    recall: float
    reranked_recall: float


def load(config: ml_collections.ConfigDict, *, validation: bool = False) -> Task:
    """Returns the features of `config.data.dir` in the splits of a run with this config.

    With `validation`, the queries are the validation queries, by which settings are chosen, on a database without them.

    Raises:
      DataError: The file cannot be read, has no labels, or is too small.
    """
    splits = build.draw_splits(config)
    assert splits.validation is not None  # a file without labels raises an error above
    query, database = splits.validation if validation else (splits.query, splits.database)
    assert query.labels is not None and database.labels is not None
    return Task(*map(_rows, (splits.train, query, database)), query.labels, database.labels, database.names)


def _rows(part: ImageSet) -> Float32[np.ndarray, "items features"]:
    return np.asarray(gather(part.images, np.arange(len(part))), np.float32)


def fit(method: str, config: ml_collections.ConfigDict, train: Float32[np.ndarray, "items features"]) -> Any:
    """Returns a function from features [n, features] to packed codes and logits, fitted by one of `METHODS`."""
    if method != "cib":
        encoder = BASELINES[method].fit(train, config.bits, jax.random.key(config.seed))

        def plain(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logits = encoder(features)
            return np.asarray(cib.pack_bits(logits)), np.asarray(logits)

        return plain
    hasher = cib.fit(
        train,
        bits=config.bits,
        backbone="none",
        hidden=config.hidden,
        objective=config.objective,
        temperature=config.temperature or None,
        beta=config.beta,
        stochastic=config.binary == "stochastic",
        augment=config.augment,
        feature_noise=config.feature_noise,
        feature_dropout=config.feature_dropout,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
    )
    return lambda features: (hasher.encode(features), hasher.logits(features))


def nearest(
    query: Float32[np.ndarray, "queries features"], database: Float32[np.ndarray, "n features"], k: int
) -> Int[np.ndarray, "queries k"]:
    """Returns the positions of the k rows of highest cosine with each query, highest first, ties in database order."""
    unit = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (query, database)]
    found = np.empty((len(query), k), np.int64)
    for start in range(0, len(query), 100):
        cosines = unit[0][start : start + 100] @ unit[1].T
        # Candidates are all rows at or above the k-th highest cosine; the stable sort keeps the first of tied rows.
        least = np.partition(cosines, -k, axis=1)[:, [-k]]
        for row, (values, bound) in enumerate(zip(cosines, least, strict=True)):
            some = np.flatnonzero(values >= bound)
            found[start + row] = some[np.argsort(-values[some], kind="stable")[:k]]
    return found


def as_bytes(features: Float32[np.ndarray, "n features"]) -> Float32[np.ndarray, "n features"]:
    """Returns features rounded to whole numbers from −127 to 127, with one scale for all."""
    return np.round(features * (127 / np.abs(features).max())).astype(np.float32)


def recall(wanted: Int[np.ndarray, "queries few"], found: Int[np.ndarray, "queries many"]) -> float:
    """Returns the mean share of `wanted` that is in `found`."""
    return float(np.mean([np.isin(few, many).mean() for few, many in zip(wanted, found, strict=True)]))


def evaluate_codes(task: Task, coded: Coded, by_float: Int[np.ndarray, "queries k"]) -> Quality:
    """Returns the quality of codes; the first k results, as many as in `by_float`, are re-ranked."""
    found = cib.rank(coded.query, coded.database, by_float.shape[1])
    _, finer = cib.Index.of(coded.database).rerank(coded.logits, found)

    def relevant(ids: np.ndarray) -> np.ndarray:
        return task.database_labels[ids] == task.query_labels[:, None]

    wanted = by_float[:, :NEAREST]
    return Quality(
        ranking.mean_average_precision(relevant(found)),
        ranking.mean_average_precision(relevant(finer)),
        recall(wanted, found[:, :AMONG]),
        recall(wanted, finer[:, :AMONG]),
    )


def measure(
    task: Task, config: ml_collections.ConfigDict, methods: Sequence[str], bits: Sequence[int], seeds: int
) -> list[tuple[str, ...]]:
    """Returns the rows of the table: floats, then each method at each code length, mean and deviation over seeds."""
    by_float = nearest(task.query, task.database, config.k)
    relevant = task.database_labels[by_float] == task.query_labels[:, None]
    size = 4 * task.database.shape[1]
    rows: list[tuple[str, ...]] = [
        ("floats, cosine", "", f"{size:,}", "1", f"{ranking.mean_average_precision(relevant):.3f}", "", "1.000", "", "")
    ]
    by_byte = nearest(task.query, as_bytes(task.database), config.k)
    quality = ranking.mean_average_precision(task.database_labels[by_byte] == task.query_labels[:, None])
    kept_recall = recall(by_float[:, :NEAREST], by_byte[:, :AMONG])
    rows.append(("int8, cosine", "", f"{size // 4:,}", "4", f"{quality:.3f}", "", f"{kept_recall:.3f}", "", ""))
    for length in bits:
        for method in methods:
            found, seconds = [], []
            for seed in range(seeds):
                config.bits, config.seed = length, seed
                begun = time.perf_counter()
                encode = fit(method, config, task.train)
                seconds.append(time.perf_counter() - begun)
                found.append(evaluate_codes(task, Coded(*encode(task.query), encode(task.database)[0]), by_float))
            cells = (measuring.mean_and_deviation(values) for values in zip(*found, strict=True))
            size_of_code = length // 8
            saving = f"{size / size_of_code:,.0f}"
            row = (METHODS[method], str(length), str(size_of_code), saving, *cells, f"{np.median(seconds):.1f} s")
            rows.append(row)
    return rows


def ask(
    task: Task,
    config: ml_collections.ConfigDict,
    methods: Sequence[str],
    asked: Sequence[str],
    model: Any,
    hits: int = 5,
) -> str:
    """Returns the results for each text, by floats and by re-ranked codes of each method; one result per line."""
    assert task.texts is not None
    features = wordnet.embed(model, asked)
    found = {"floats": nearest(features, task.database, hits)}
    for method in methods:
        encode = fit(method, config, task.train)
        codes, logits = encode(features)
        database = encode(task.database)[0]
        _, ids = cib.Index.of(database).rerank(logits, cib.rank(codes, database, min(config.k, len(database))))
        found[METHODS[method]] = ids[:, :hits]
    lines = []
    for row, question in enumerate(asked):
        lines.append(f"“{question}”")
        for name, ids in found.items():
            lines += [f"  {'' if rank else name:8} {task.texts[index]}" for rank, index in enumerate(ids[row])]
    return "\n".join(lines)


def main() -> None:
    """Reads the flags and prints the table or the results of a search."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--data", required=True, help="features file, with labels")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to compare")
    parser.add_argument(
        "--bits", type=int, nargs="+", default=[16, 32, 64, 128], help="code lengths; --ask uses the first"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--ask", nargs="*", help="texts to search with; without a text, five examples")
    parser.add_argument("--model", default="", help="model of the embeddings, as in benchmarks.wordnet")
    parser.add_argument("--validation", action="store_true", help="use the validation queries")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of configs/text.py")
    flags = parser.parse_args()
    config = text.get_config()
    config.data.dir = flags.data
    try:
        for name, _, value in (setting.partition("=") for setting in flags.set):
            if name not in config:
                raise ValueError(f"{name} is not a field")
            config[name] = type(config[name])(value)
        schema.validate(config)
    except ValueError as error:
        sys.exit(f"--set: {error}; write fields of configs/default.py as in temperature=0.2")
    try:
        task = load(config, validation=flags.validation)
        model = wordnet.load_model(flags.model) if flags.ask is not None else None
    except UserError as error:
        sys.exit(str(error))
    if model is not None:
        config.bits = flags.bits[0]
        print(ask(task, config, flags.methods, flags.ask or ASKED, model))
        return
    print(measuring.machine("jax", "numpy"), end="\n\n")
    counts = np.bincount(task.database_labels) / len(task.database)
    print(
        f"{len(task.query):,} queries on {len(task.database):,}, {len(task.train):,} of them train; MAP by chance is "
        f"about {np.mean(counts[task.query_labels]):.3f}\n"
    )
    at = f"MAP@{config.k}"
    recall_name = f"{NEAREST} nearest in {AMONG}"
    header = ("method", "bits", "bytes", "smaller", at, "re-ranked", recall_name, "re-ranked", "fitting")
    measuring.print_table(header, measure(task, config, flags.methods, flags.bits, flags.seeds))


if __name__ == "__main__":
    main()
