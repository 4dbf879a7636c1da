"""MeCoQ, a quantizer, on the features, views and splits of a run: its codes are words of codebooks, not bits.

`python -m benchmarks.quantization RUN --bits 16 32 64 --seeds 0 1 2`, where RUN is the workdir of a run, such as a cell
of a comparison. A code of 16 bits is a word of 256 in each of two codebooks, and images are ranked by sums of inner
products from tables, where `--mode=compare` ranks by Hamming distance. Symmetric: words against words, as codes are
compared elsewhere. Asymmetric: the real values of a query against words.

References:
  Wang et al., Contrastive quantization with code memory for unsupervised image retrieval, AAAI 2022
  (https://arxiv.org/abs/2109.05205).
"""

import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from benchmarks import measuring, ranking
from cib_jax.baselines.networks import Schedule, center_and_scale, minimize_with_memory, uniform, unit_rows
from cib_jax.errors import UserError
from cib_jax.inference.serialization import read_config
from cib_jax.runs import context, features

WORDS, DIMENSIONS = 256, 12  # of a codebook; the second as published for CIFAR-10
SHARPNESS, ENTROPY, DIVERSITY = 10.0, 0.1, 0.5  # α, λ and γ of the published code
MEMORY, MEMORY_EPOCH = 384, 15  # soft codes of earlier batches, and the epoch in which they become negatives
EPOCHS, BATCH = 60, 64

Params = dict[str, Array]


class Settings(NamedTuple):
    """What the published experiments choose for each data set."""

    temperature: float
    prior: float
    """Share of pairs that show the same class, for the correction of negatives."""
    learning_rate: float


class Memory(NamedTuple):
    """What the steps before leave for the next one."""

    steps: Int[Array, ""]
    """Their number."""
    codes: Float[Array, "memory books words"]
    """Soft codes of the last batches, the newest first."""


def project(params: Params, rows: Float[Array, "batch features"]) -> Float[Array, "batch books numbers"]:
    """Returns the parts of projected features, each of length 1."""
    books = len(params["words"])
    return unit_rows((rows @ params["kernel"] + params["bias"]).reshape(len(rows), books, -1))


def soft_codes(params: Params, rows: Float[Array, "batch features"]) -> Float[Array, "batch books words"]:
    """Returns the share of each word in a part of the features."""
    likeness = jnp.einsum("nbd,bwd->nbw", project(params, rows), unit_rows(params["words"]))
    return jax.nn.softmax(SHARPNESS * likeness, axis=-1)


def contrast(
    pair: Float[Array, "2 batch numbers"], memory: Float[Array, "memory numbers"], active: Array, settings: Settings
) -> Float[Array, ""]:
    """Returns the debiased contrast of views, whose negatives are the rest of the batch and an active memory."""
    rows, memory = unit_rows(pair.reshape(-1, pair.shape[-1])), unit_rows(memory)
    count, batch = len(rows), pair.shape[1]
    likeness = jnp.exp(rows @ rows.T / settings.temperature)
    positive = likeness[jnp.arange(count), (jnp.arange(count) + batch) % count]
    own = jnp.trace(likeness) / count  # e^(1/τ), of a row with itself
    negatives = jnp.sum(likeness, axis=1) - own - positive
    negatives += active * jnp.sum(jnp.exp(rows @ memory.T / settings.temperature), axis=1)
    number = count - 2 + active * len(memory)
    corrected = (negatives - settings.prior * number * positive) / (1 - settings.prior)
    corrected = jnp.maximum(corrected, number * jnp.exp(-1 / settings.temperature))
    return -jnp.mean(jnp.log(positive / (positive + corrected)))


def train(views: Float[np.ndarray, "views n features"], bits: int, key: PRNGKeyArray, settings: Settings) -> Params:
    """Returns a projection and codebooks that agree on two views of an image.

    The published code keeps the codebooks as they were drawn; here they are trained, as its paper says.
    """
    init_key, word_key, train_key = jax.random.split(key, 3)
    books, (count, images, width) = bits // 8, views.shape
    mean, scale = center_and_scale(views)
    params = {
        "kernel": uniform(init_key, (width, books * DIMENSIONS)),
        "bias": jnp.zeros(books * DIMENSIONS),
        "words": unit_rows(jax.random.normal(word_key, (books, WORDS, DIMENSIONS))),
    }
    first_active = MEMORY_EPOCH * (images // min(BATCH, images))

    def loss_of(params: Params, memory: Memory, rows: Array, key: PRNGKeyArray) -> tuple[Array, Memory]:
        chosen = jax.random.choice(key, count, (2,), replace=False)
        codes = jnp.stack([soft_codes(params, (rows[:, view] - mean) / scale) for view in chosen])
        words = unit_rows(params["words"])

        def rebuild(codes: Array) -> Array:
            return jnp.einsum("...bw,bwd->...bd", codes, words).reshape(*codes.shape[:-2], -1)

        entropy = -jnp.mean(jnp.sum(codes * jnp.log(codes + 1e-12), axis=-1))
        diversity = jnp.mean(jnp.einsum("bwd,bvd->bwv", words, words))
        active = jnp.where(memory.steps >= first_active, 1.0, 0.0)
        loss = contrast(rebuild(codes), rebuild(memory.codes), active, settings)
        kept = jnp.concatenate([jax.lax.stop_gradient(codes).reshape(-1, *codes.shape[2:]), memory.codes])[:MEMORY]
        return loss + ENTROPY * entropy + DIVERSITY * diversity, Memory(memory.steps + 1, kept)

    memory = Memory(jnp.int32(0), jnp.full((MEMORY, books, WORDS), 1 / WORDS))
    items = jnp.asarray(np.swapaxes(views, 0, 1))
    schedule = Schedule(EPOCHS, BATCH, settings.learning_rate)
    params = minimize_with_memory(params, memory, loss_of, items, train_key, schedule)
    return params | {"mean": mean, "scale": scale}


@jax.jit
def parts_and_words(params: Params, rows: Float[Array, "n features"]) -> tuple[Array, Array]:
    """Returns the parts of projected features [n, books, numbers], and the nearest word of each [n, books]."""
    parts = project(params, (rows - params["mean"]) / params["scale"])
    likeness = jnp.einsum("nbd,bwd->nbw", parts, unit_rows(params["words"]))
    return parts, jnp.argmax(likeness, axis=-1).astype(jnp.uint8)


def mean_average_precision(
    tables: Float[np.ndarray, "queries books words"],
    words: UInt8[np.ndarray, "n books"],
    relevant: np.ndarray,
    k: int,
) -> float:
    """Returns MAP@k of queries, each with the likeness of its code to all words; ties in database order."""
    found = []
    for table, hits in zip(tables, relevant, strict=True):
        likeness = np.sum([table[book][words[:, book]] for book in range(words.shape[1])], axis=0)
        found.append(hits[ranking.highest(likeness, k)])
    return ranking.mean_average_precision(np.array(found))


def main() -> None:
    """Reads the flags, trains and ranks, and prints a table."""
    parser = measuring.parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, help="workdir of a run or of a cell of a comparison")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 32, 64], help="multiples of 8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--temperature", type=float, default=0.35, help="τ; published for CIFAR-10")
    parser.add_argument("--prior", type=float, default=0.1, help="share of pairs of one class; published for CIFAR-10")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    flags = parser.parse_args()
    if any(bits < 8 or bits % 8 for bits in flags.bits):
        parser.error(f"--bits must be multiples of 8, got {flags.bits}")
    settings = Settings(flags.temperature, flags.prior, flags.learning_rate)
    try:
        run = context.prepare_run(read_config(flags.run), flags.run, rich.console.Console(stderr=True))
    except UserError as error:
        parser.error(str(error))
    query, database = run.splits.query, run.splits.database
    if query.labels is None or database.labels is None or query.labels.ndim > 1:
        parser.error(f"{flags.run} must have one label for each image")
    relevant = query.labels[:, None] == database.labels
    try:
        views = features.views_before_hashing(run, run.splits.train, "Views, training")
    except UserError as error:
        parser.error(str(error))
    rows = {
        name: np.concatenate(list(features.before_hashing(run, images, f"Features, {name}")))
        for name, images in {"query": query, "database": database}.items()
    }
    k = run.protocol.k or len(database)
    print(measuring.machine("jax"), f"; MAP@{k}; {settings}", flush=True)
    table = []
    for bits in flags.bits:
        maps, seconds = [], []
        for seed in flags.seeds:
            begun = time.perf_counter()
            params = jax.block_until_ready(train(views, bits, jax.random.key(seed), settings))
            seconds.append(time.perf_counter() - begun)
            parts, asked = (np.asarray(array) for array in parts_and_words(params, rows["query"]))
            words = np.asarray(parts_and_words(params, rows["database"])[1])
            codebooks = np.asarray(unit_rows(params["words"]))
            chosen = codebooks[np.arange(bits // 8), asked]
            tables = (np.einsum("nbd,bwd->nbw", one, codebooks) for one in (chosen, parts))
            maps.append([mean_average_precision(one, words, relevant, k) for one in tables])
        cells = [measuring.mean_and_deviation(values) for values in zip(*maps, strict=True)]
        table.append((bits, *cells, f"{np.mean(seconds):.0f}"))
    measuring.print_table(("bits", "symmetric", "asymmetric", "seconds of training"), table)


if __name__ == "__main__":
    main()
