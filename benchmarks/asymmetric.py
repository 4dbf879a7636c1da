"""MAP of runs by Hamming distance and by asymmetric distance, which weighs a bit by the query's certainty of it.

`python -m benchmarks.asymmetric RUN …` reads the codes and labels that each evaluated run has left in `codes/` of its
workdir, computes the logits of its queries, and ranks the whole database by both distances, for each length of nested
codes. The asymmetric distance is that of `Index.rerank`, the sum of |logit| over the bits that differ; the database
stays binary. MAP is over the run's first `k` ranks.
"""

import pathlib

import numpy as np
import rich.console

from benchmarks import graph, measuring
from cib_jax.codes import nested_lengths, ones
from cib_jax.inference.hasher import Hasher
from cib_jax.inference.serialization import read_config, read_standard
from cib_jax.runs import context, features


def main() -> None:
    """Reads the flags and prints a table."""
    parser = measuring.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN", help="workdir of an evaluated run")
    rows = [(folder, *row) for folder in parser.parse_args().runs for row in measure(folder)]
    measuring.print_table(("run", "bits", "MAP by Hamming distance", "by asymmetric distance"), rows)


def measure(folder: pathlib.Path) -> list[tuple[int, str, str]]:
    """Returns the length of each code of a run, and both of its MAPs."""
    config = read_config(folder)
    console, standard = rich.console.Console(stderr=True), read_standard(folder, config)
    run = context.prepare_run(config, folder, console, trained=True, standard=standard)
    logits = features.logits(run, Hasher.load(folder).params, run.splits.query, "logits of the queries")
    codes, query_labels, labels = (
        np.load(folder / "codes" / f"{name}.npy") for name in ("database_codes", "query_labels", "database_labels")
    )
    k = run.protocol.k or len(codes)
    found = []
    for bits in nested_lengths(config.bits) if config.nested else [config.bits]:
        signs = np.where(ones(codes, bits), np.float32(1), np.float32(-1))
        hamming, asymmetric = mean_average_precisions(logits[:, :bits], signs, query_labels, labels, k)
        found.append((bits, f"{hamming:.4f}", f"{asymmetric:.4f}"))
    return found


def mean_average_precisions(
    logits: np.ndarray, signs: np.ndarray, query_labels: np.ndarray, labels: np.ndarray, k: int
) -> tuple[float, float]:
    """Returns MAP by Hamming distance, and by asymmetric distance, of a database of bits that are 1 and -1."""
    maps = []
    # The sum of |logit| over the bits that differ is (sum of |logit| - logits @ signs) / 2.
    for queries in (np.where(logits > 0, np.float32(1), np.float32(-1)), logits):
        each = []
        for query, own in zip(queries, query_labels, strict=True):
            relevant = labels == own if labels.ndim == 1 else labels.astype(int) @ own > 0
            each.append(graph.average_precision(signs @ query, relevant, k))
        maps.append(float(np.mean(each)))
    return maps[0], maps[1]


if __name__ == "__main__":
    main()
