"""The tables of docs/results.md: measured by one command each, and written into the page.

`python -m benchmarks.tables cifar digits --data-dir=DIR` runs the comparisons that are not finished in runs/tables and
replaces the text between `<!-- NAME -->` and `<!-- end -->` by the command and the tables that it wrote.
"""

import argparse
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
COMMANDS = {
    "cifar": "run.py --mode=compare --config=configs/cifar.py --config.data.dir=DIR --workdir=runs/tables/cifar",
    "digits": "run.py --mode=compare --config=configs/digits.py --workdir=runs/tables/digits",
}
"""The command of each block of the page, in which DIR stands for a TFDS data_dir with CIFAR-10."""


def measure(name: str, data_dir: str) -> str:
    """Runs a comparison, or what is missing of it, and returns its tables in Markdown."""
    command = [part.replace("=DIR", f"={data_dir}") for part in shlex.split(COMMANDS[name])]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return (ROOT / "runs" / "tables" / name / "comparison.md").read_text(encoding="utf-8").strip()


def replace_block(page: str, name: str, tables: str) -> str:
    """Returns the page with another command and other tables between a block's marks."""
    pattern = rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)"
    if len(re.findall(pattern, page, re.DOTALL)) != 1:
        raise ValueError(f"docs/results.md must have one block <!-- {name} --> … <!-- end -->")
    command = COMMANDS[name].replace(" --workdir", " \\\n  --workdir")
    block = f"\n```\npython {command}\n```\n\n{tables}\n\n"
    return re.sub(pattern, lambda _: block, page, flags=re.DOTALL)


def main() -> None:
    """Reads the flags, measures and writes the page."""
    parser = argparse.ArgumentParser(description="Tables of docs/results.md.")
    parser.add_argument("names", nargs="+", choices=COMMANDS, help="blocks of the page to measure")
    parser.add_argument("--data-dir", default="", help="a TFDS data_dir with CIFAR-10; '' is ~/tensorflow_datasets")
    flags = parser.parse_args()
    for name in flags.names:
        tables = measure(name, flags.data_dir)
        PAGE.write_text(replace_block(PAGE.read_text(encoding="utf-8"), name, tables), encoding="utf-8")


if __name__ == "__main__":
    main()
