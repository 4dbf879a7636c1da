"""Many runs in one folder, as in a comparison or a search: each is claimed by one of several processes."""

import contextlib
import datetime
import functools
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import rich.console
import rich.live
import rich.progress_bar
import rich.spinner
import rich.table
import rich.text

from cib_jax.console import LineSender, print_message
from cib_jax.errors import BusyError, DistributedError
from cib_jax.files import count
from cib_jax.report.html import Grid
from cib_jax.runs.processes import run, worker_count
from cib_jax.runs.workdir import exclusive, read_json

Record = dict[str, Any]
"""Contents of the file that says what a run came to."""

Result = TypeVar("Result")


class Item(Protocol):
    """One of the runs; it must be picklable."""

    @property
    def title(self) -> str:
        """Name of the run in messages."""

    @property
    def record_path(self) -> pathlib.Path:
        """The file that exists if and only if the run is complete."""


def load_record(item: Item) -> Record | None:
    """Returns the record of a run, None if it is not complete."""
    return read_json(item.record_path) if item.record_path.exists() else None


def run_all(
    items: Sequence[Item],
    work: Callable[[Any, rich.console.Console], str | None],
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

    `work` is an importable function that completes an item, with messages to a console, and returns a sentence about
    it, None if nothing can be done about it now; it raises `BusyError` if another process is working on the item. The
    record of an item that is not complete is None. 0 `workers` are as many as cores and memory allow. `noun` names an
    item. A terminal shows what each worker is doing, and how many items are complete.
    """
    workers = min(worker_count(workers), len(items))
    processes = count(workers, "process", "processes")
    complete = _count_complete(items)
    print_message(console, f"{count(len(items), noun)}, {complete} complete; {processes} at work in {workdir}")
    broken = None
    with _display(items, noun, console) as receive:
        try:
            run(_work_on_all, (items, work), workers, receive)
        except DistributedError as error:
            broken = error
        # Once more for what a broken process left undone, and what was skipped while another command was at it.
        _work_on_all(items, work, functools.partial(receive, 0))
    with exclusive(workdir / ".lock", wait=True):  # of several commands that end together, one concludes at a time
        records = [load_record(item) for item in items]
        result = conclude(records)
    if broken and None in records:
        raise broken
    return result


class _Message(NamedTuple):
    """What a worker says: the sentence about a run that it has completed, or what it is doing, "" for nothing."""

    text: str
    complete: bool = False


def _work_on_all(
    items: Sequence[Item],
    work: Callable[[Item, rich.console.Console], str | None],
    send: Callable[[_Message], None],
) -> None:
    for item in items:
        if item.record_path.exists():
            continue
        begin = f"{item.title}: "
        lines = LineSender(lambda line, begin=begin: send(_Message(begin + line)))  # type: ignore[misc]
        try:
            sentence = work(item, rich.console.Console(file=lines, width=200))  # type: ignore[arg-type]
        except BusyError:
            continue
        send(_Message(sentence or "", complete=bool(sentence)))
    send(_Message(""))


@contextlib.contextmanager
def _display(
    items: Sequence[Item], noun: str, console: rich.console.Console
) -> Iterator[Callable[[int, _Message], None]]:
    """Yields a function of a worker's number and message, which prints each completed run.

    On a terminal, there is a bar over the items, with the time left, and below what each worker is doing.
    """
    doing: dict[int, str] = {}
    begun = last = time.monotonic()
    complete = before = _count_complete(items)

    def receive(worker: int, message: _Message) -> None:
        nonlocal complete, last
        doing[worker] = "" if message.complete else message.text
        if message.complete:
            complete, last = _count_complete(items), time.monotonic()
            print_message(console, f"{complete} of {len(items)} complete: {message.text}")

    spinner = rich.spinner.Spinner("line")  # moves while workers are starting

    def render() -> rich.console.Group:
        left = "-:--:--"
        if complete > before:
            seconds = (last - begun) * (len(items) - complete) / (complete - before) - (time.monotonic() - last)
            if round(seconds) > 0:  # a run may take longer than those before it
                left = str(datetime.timedelta(seconds=round(seconds)))
        bar = rich.progress_bar.ProgressBar(total=len(items), completed=complete, width=40)
        line = rich.table.Table.grid(padding=(0, 1))
        line.add_row(bar, f"{complete} of {count(len(items), noun)}, {left} left", spinner)
        lines = (rich.text.Text(text) for _, text in sorted(doing.items()) if text)
        return rich.console.Group(line, *lines)

    if console.is_terminal and not console.quiet:
        with rich.live.Live(get_renderable=render, console=console, transient=True):
            yield receive
    else:
        yield receive


def _count_complete(items: Sequence[Item]) -> int:
    return sum(item.record_path.exists() for item in items)


def print_grid(
    console: rich.console.Console, grid: Grid, *, dimmed: Collection[int] = (), rows: int | None = None
) -> None:
    """Prints a table of a report, or its first `rows` rows; rows with numbers in `dimmed` are printed faintly."""
    print_message(console, grid.title)
    table = rich.table.Table()
    for number, name in enumerate(grid.header):
        table.add_column(name, justify="right" if number else "left")
    for number, row in enumerate(grid.rows[:rows]):
        table.add_row(*row, style="dim" if number in dimmed else "")
    console.print(table)
