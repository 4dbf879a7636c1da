"""MAP against the number K of views in the bank (`train.views`); K = 0 means fresh views at every step.

`python -m benchmarks.views --data-dir=DIR` trains the CIFAR-10 experiment with each K and seed. Finished runs under
`--workdir` are not repeated, views are computed once for all K, and an interrupted study can be continued.
"""

import argparse
import pathlib
import statistics
import time

import rich.console

from benchmarks import measuring
from cib_jax.commands.train import train
from configs import cifar


def main() -> None:
    """Reads the flags, trains and prints the table."""
    parser = argparse.ArgumentParser(description="MAP against views.", formatter_class=measuring.Formatter)
    parser.add_argument("--data-dir", default="", help="a TFDS data_dir with CIFAR-10")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/views"))
    parser.add_argument("--views", type=int, nargs="+", default=[0, 2, 4, 8, 16, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=128)
    flags = parser.parse_args()
    console = rich.console.Console(quiet=True)
    rows = []
    for views in flags.views:
        maps, seconds, begun = [], [], time.perf_counter()
        for seed in flags.seeds:
            config = cifar.get_config()
            config.data.dir, config.seed, config.bits = flags.data_dir, seed, flags.bits
            config.image_size, config.train.views = flags.image_size, views
            name = f"{flags.image_size}px-{flags.bits}bits-{views}views-seed{seed}"
            results = train(config, flags.workdir / name, console=console)
            maps.append(results["map"])
            seconds.append(results["seconds"]["train"])
        row = [
            views or "0 (fresh)",
            measuring.mean_and_deviation(maps, 4),
            " ".join(f"{value:.4f}" for value in maps),
            f"{statistics.median(seconds):.0f}",
        ]
        rows.append(row)
        print(f"{views} views: {row[1]}; {time.perf_counter() - begun:.0f} s including features", flush=True)
    print(f"\n{measuring.machine('jax')}; CIFAR-10, {flags.image_size} px, {flags.bits} bits, 60 epochs\n")
    header = ["views K", "MAP@1000, mean ± deviation", f"seeds {' '.join(map(str, flags.seeds))}", "training, s"]
    measuring.print_table(header, rows)


if __name__ == "__main__":
    main()
