"""What a job shows while it works: bars on a terminal, a line now and then in a log."""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

from cib_jax import program

LINE_EVERY = 10.0
"""Seconds between lines where the output is no terminal; the first comes after a third of them."""

RATED_AFTER = 0.2
"""Seconds after which images/s are told."""


@contextlib.contextmanager
def bar(console: rich.console.Console, what: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields a function of (images more, words about them) that moves a bar on, with images/s and the time left."""
    program.HINT.clear()
    if console.is_terminal:
        columns = (
            rich.progress.TextColumn(what),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[words]}"),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=console) as progress:
            task = progress.add_task(what, total=total, completed=done, words="")
            moved = _rated(lambda more, words: progress.update(task, advance=more, words=words))
            yield moved
        return
    told = begun = time.monotonic()
    before, wait = done, LINE_EVERY / 3

    def line(more: int, words: str) -> None:
        nonlocal done, told, wait
        done += more
        if time.monotonic() - told > wait or done >= total:
            told, wait = time.monotonic(), LINE_EVERY
            seconds = (told - begun) * (total - done) / max(done - before, 1)
            left = f", {datetime.timedelta(seconds=round(seconds))} left" if done < total else ""
            told_of = ", ".join(filter(None, (f"{what}: {done:,} of {total:,}", words)))
            console.print(f"{told_of}{left}", highlight=False, soft_wrap=True, markup=False)

    yield _rated(line)


def _rated(show: Callable[[int, str], None]) -> Callable[[int, str], None]:
    begun, images = time.monotonic(), 0

    def moved(more: int, words: str = "") -> None:
        nonlocal images
        images += more
        seconds = time.monotonic() - begun
        # Steps that are only sent on their way took no time.
        rate = f"{images / seconds:,.0f} images/s" if seconds > RATED_AFTER else ""
        show(more, ", ".join(filter(None, (words, rate))))

    return moved
