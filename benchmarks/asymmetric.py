"""MAP of runs by Hamming distance and by asymmetric distance, which weighs a bit by the query's certainty of it.

`python -m benchmarks.asymmetric RUN …` reads the codes and labels that each evaluated run has left in `codes/` of its
workdir, computes the logits of its queries, and ranks the whole database by both distances, for each length of nested
codes. The asymmetric distance is that of `Index.rerank`, the sum of |logit| over the bits that differ; the database
stays binary. MAP is over the run's first `k` ranks.
"""

import pathlib

import numpy as np
import rich.console

import cib_jax as cib
from benchmarks import measuring, ranking
from cib_jax.codes import first_bits, nested_lengths, ones, pack_bits
from cib_jax.inference.hasher import Hasher
from cib_jax.inference.serialization import read_config, read_standard
from cib_jax.runs import context, features

QUERIES = 100  # that are compared with the database at once


def main() -> None:
    """Reads the flags and prints a table."""
    parser = measuring.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN", help="workdir of an evaluated run")
    rows = [(folder, *row) for folder in parser.parse_args().runs for row in measure(folder)]
    measuring.print_table(("run", "bits", "MAP by Hamming distance", "by asymmetric distance"), rows)


def measure(folder: pathlib.Path) -> list[tuple[object, ...]]:
    """Returns the length of each code of a run, and both of its MAPs."""
    config = read_config(folder)
    console, standard = rich.console.Console(stderr=True), read_standard(folder, config)
    run = context.prepare_run(config, folder, console, trained=True, standard=standard)
    logits = features.logits(run, Hasher.load(folder).params, run.splits.query, "logits of the queries")
    codes, query_labels, labels = (
        np.load(folder / "codes" / f"{name}.npy") for name in ("database_codes", "query_labels", "database_labels")
    )
    k = run.protocol.k or len(codes)
    lengths = nested_lengths(config.bits) if config.nested else [config.bits]
    return compare(logits, codes, query_labels, labels, k, lengths)


def compare(
    logits: np.ndarray, codes: np.ndarray, query_labels: np.ndarray, labels: np.ndarray, k: int, lengths: list[int]
) -> list[tuple[object, ...]]:
    """Returns each length of code, and MAP by Hamming and by asymmetric distance."""
    found = []
    for bits in lengths:
        database = first_bits(codes, bits)
        maps = (
            cib.mean_average_precision(pack_bits(logits[:, :bits]), database, query_labels, labels, k),
            mean_average_precision(logits[:, :bits], database, query_labels, labels, k),
        )
        found.append((bits, *(f"{figure:.4f}" for figure in maps)))
    return found


def mean_average_precision(
    logits: np.ndarray, codes: np.ndarray, query_labels: np.ndarray, labels: np.ndarray, k: int
) -> float:
    """Returns MAP by asymmetric distance from the queries' logits to packed codes."""
    signs = np.where(ones(codes, logits.shape[1]), np.float32(1), np.float32(-1))
    relevant = []
    for start in range(0, len(logits), QUERIES):
        # The sum of |logit| over the bits that differ is (sum of |logit| - logits @ signs) / 2.
        scores = logits[start : start + QUERIES] @ signs.T
        for row, own in zip(scores, query_labels[start : start + QUERIES], strict=True):
            first = labels[ranking.highest(row, k)]
            relevant.append(first == own if labels.ndim == 1 else first.astype(int) @ own > 0)
    return ranking.mean_average_precision(np.array(relevant))


if __name__ == "__main__":
    main()
