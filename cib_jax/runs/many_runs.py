"""Many runs in one folder, as in a comparison or a search: each is claimed by one of several processes."""

import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar

import rich.console
import rich.table

from cib_jax.console import print_message
from cib_jax.errors import BusyError, DistributedError
from cib_jax.report.html import Grid
from cib_jax.runs.processes import run, worker_count
from cib_jax.runs.workdir import exclusive, read_json

Record = dict[str, Any]
"""Contents of the file that says what a run came to."""

Result = TypeVar("Result")


class Item(Protocol):
    """One of the runs; it must be picklable."""

    @property
    def record_path(self) -> pathlib.Path:
        """The file that exists if and only if the run is complete."""


def load_record(item: Item) -> Record | None:
    """Returns the record of a run, None if it is not complete."""
    return read_json(item.record_path) if item.record_path.exists() else None


def run_all(
    items: Sequence[Item],
    work: Callable[[Any], str | None],
    conclude: Callable[[list[Record | None]], Result],
    *,
    workdir: pathlib.Path,
    workers: int,
    noun: str,
    console: rich.console.Console,
) -> Result:
    """Completes every item that no other process is working on, and returns what `conclude` makes of the records.

    Several calls, in several processes or on several machines, may share a folder. Killed anywhere, the same call goes
    on with what is not complete.

    `work` is an importable function that completes an item and returns a sentence about it, None if nothing can be done
    about it now; it raises `BusyError` if another process is working on the item. The record of an item that is not
    complete is None. 0 `workers` are as many as cores and memory allow. `noun` names the items, in the plural.
    """
    workers = min(worker_count(workers), len(items))
    processes = "1 process" if workers == 1 else f"{workers} processes"
    complete = _count_complete(items)
    print_message(console, f"{len(items)} {noun}, {complete} of them complete; {processes} at work in {workdir}")
    broken = None
    try:
        run(_work_on_all, (items, work), workers)
    except DistributedError as error:
        broken = error
    # Once more for what a broken process left undone, and what was skipped while another command was at it.
    _work_on_all(items, work, True)
    with exclusive(workdir / ".lock", wait=True):  # of several commands that end together, one concludes at a time
        records = [load_record(item) for item in items]
        result = conclude(records)
    if broken and None in records:
        raise broken
    return result


def _work_on_all(items: Sequence[Item], work: Callable[[Item], str | None], verbose: bool) -> None:
    console = rich.console.Console(quiet=not verbose)
    for item in items:
        if item.record_path.exists():
            continue
        try:
            sentence = work(item)
        except BusyError:
            continue
        if sentence:
            print_message(console, f"{_count_complete(items)} of {len(items)} complete: {sentence}")


def _count_complete(items: Sequence[Item]) -> int:
    return sum(item.record_path.exists() for item in items)


def print_grid(
    console: rich.console.Console, grid: Grid, *, dimmed: Collection[int] = (), rows: int | None = None
) -> None:
    """Prints a table of a report, or its first `rows` rows; rows with numbers in `dimmed` are printed faintly."""
    table = rich.table.Table(title=grid.title)
    for number, name in enumerate(grid.header):
        table.add_column(name, justify="right" if number else "left")
    for number, row in enumerate(grid.rows[:rows]):
        table.add_row(*row, style="dim" if number in dimmed else "")
    console.print(table)
