"""Speed of training the hash head on cached features: the original's loop in PyTorch against a scan in JAX.

`python -m benchmarks.head` runs a few epochs of each in turn; `--epochs=60 --rounds=1` is the paper's training.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cib_jax as cib
from benchmarks import measuring
from cib_jax.models.encoder import Params
from cib_jax.training import input_pipeline, loop
from cib_jax.training.loop import Schedule
from cib_jax.training.train_step import Method, Progress


def make_bank(views: int, images: int, features: int) -> np.ndarray:
    """Returns synthetic float32 features, non-negative and clustered like those of a network."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(50, features))
    one = centers[generator.integers(50, size=images)] + generator.normal(size=(images, features))
    noise = generator.standard_normal((views, images, features), np.float32)
    return np.clip(one + 0.5 * noise, 0, 6).astype(np.float32)


def trainer(
    bank: jax.Array, encoder: cib.Encoder, params: Params, *, epochs: int, batch_size: int
) -> Callable[[], None]:
    """Returns a function that trains as `run.py` does, without writing files; it compiles in its first call."""
    optimizer = optax.adam(1e-3)
    feed = input_pipeline.from_bank(bank, Method(encoder, optimizer), input_pipeline.BatchOrder(0, batch_size))

    def train() -> None:
        state, _ = loop.run(
            cib.create_train_state(params, optimizer),
            Progress(),
            feed,
            key=jax.random.key(0),
            schedule=Schedule(epochs, batch_size),
        )
        jax.block_until_ready(state)

    return train


def main() -> None:
    """Reads the flags and prints the table."""
    parser = measuring.parser("Head training on cached features.", "torch", "torchvision", "cv2")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    from benchmarks import original

    bank = make_bank(flags.views, flags.images, flags.features)
    device_bank = jnp.asarray(bank.astype(input_pipeline.STORED))
    steps = flags.epochs * (flags.images // flags.batch)
    rows = []
    for bits in flags.bits:
        encoder, params, _ = cib.create_encoder(
            jax.random.key(0), backbone="efficientnet_lite0", bits=bits, frozen=True, pretrained=False
        )
        # The head takes features of the bank's size, which may differ from the backbone's.
        kernel = jax.random.uniform(jax.random.key(1), (flags.features, 1024), minval=-0.02, maxval=0.02)
        params["head"]["hidden"]["kernel"] = kernel
        work = {"epochs": flags.epochs, "batch_size": flags.batch}
        taken = measuring.in_turns(
            {
                "original": functools.partial(original.train_head, bank, bits=bits, **work),
                "cib_jax": trainer(device_bank, encoder, params, **work),
            },
            rounds=flags.rounds,
        )
        theirs, ours = taken["original"], taken["cib_jax"]
        rows.append(
            [
                bits,
                f"{theirs.median:.1f}",
                f"{theirs.median / steps * 1e3:.2f}",
                f"{ours.median:.1f}",
                f"{ours.median / steps * 1e3:.2f}",
                measuring.format_ratio(theirs, ours),
            ]
        )
    print(f"{measuring.machine('jax', 'torch')}\n")
    print(f"{flags.images} images, {flags.views} views, {flags.features} features, batch {flags.batch}, ", end="")
    print(f"{flags.epochs} epochs, median of {flags.rounds}; synthetic features; compilation not counted\n")
    measuring.print_table(["bits", "original, s", "ms/step", "cib_jax, s", "ms/step", "times faster (min–max)"], rows)


if __name__ == "__main__":
    main()
