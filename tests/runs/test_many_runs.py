"""Many runs in one folder: each completed once, whoever claims it."""

import functools
import io
import json
import pathlib
import re
import time
from typing import NamedTuple

import pytest
import rich.console

from cib_jax.errors import BusyError
from cib_jax.report.html import Grid
from cib_jax.runs.many_runs import print_grid, run_all


class Item(NamedTuple):
    folder: pathlib.Path
    name: str

    @property
    def title(self):
        return self.name

    @property
    def record_path(self):
        return self.folder / f"{self.name}.json"


def complete(item, console):
    console.print("epoch 3")
    if item.name == "busy":
        raise BusyError("another process is working on it")
    if item.name == "later":
        return None
    assert not item.record_path.exists()
    item.record_path.write_text(json.dumps({"name": item.name}))
    return f"{item.name} is complete"


@pytest.fixture
def console():
    return rich.console.Console(record=True, width=120)


def run(folder, names, console):
    items = [Item(folder, name) for name in names]
    options = {"workdir": folder, "workers": 1, "noun": "item", "console": console}
    return run_all(items, complete, lambda records: [record and record["name"] for record in records], **options)


def test_what_is_complete_stays_and_what_others_work_on_is_left_to_them(tmp_path, console):
    (tmp_path / "done.json").write_text('{"name": "by another"}')
    assert run(tmp_path, ["done", "busy", "new", "later"], console) == ["by another", None, "new", None]
    assert "4 items, 1 complete; 1 process at work" in console.export_text(clear=False)
    assert run(tmp_path, ["new", "newer"], console) == ["new", "newer"]


def wait_until_shown(item, console, *, shown):
    console.print("epoch 3 loss 2.5")
    wait_until(lambda: f"{item.name}: epoch 3 loss 2.5" in shown.getvalue())
    return complete(item, console)


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("in vain")


def test_a_terminal_shows_what_each_worker_is_doing_and_every_result(tmp_path):
    shown = io.StringIO()
    console = rich.console.Console(file=shown, width=80, force_terminal=True)
    items = [Item(tmp_path, name) for name in ("a", "b")]
    work = functools.partial(wait_until_shown, shown=shown)
    options = {"workdir": tmp_path, "workers": 1, "noun": "item", "console": console}
    run_all(items, work, lambda records: None, **options)
    assert "1 of 2 items" in shown.getvalue() and "2 of 2 complete: b is complete" in shown.getvalue()


def print_much(item, console, *, shown):
    words = "Training: 1,472 of 2,944, epoch 1 loss 4.7757 kl 0.7412, 1,234 images/s, 0:00:12 left"
    console.print(words)
    wait_until(lambda: words in " ".join(re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown.getvalue()).split()))
    return complete(item, console)


def test_what_a_worker_is_doing_is_shown_whole_in_a_narrow_terminal(tmp_path):
    shown = io.StringIO()
    console = rich.console.Console(file=shown, width=80, force_terminal=True)
    options = {"workdir": tmp_path, "workers": 1, "noun": "item", "console": console}
    run_all([Item(tmp_path, "long")], functools.partial(print_much, shown=shown), lambda records: None, **options)


def overdue(item, console, *, shown):
    if item.name == "slow":
        wait_until(lambda: "1 of 2 items, -:--:-- left" in re.sub(r"\s+", " ", shown.getvalue()))
    return complete(item, console)


def test_no_time_is_left_of_a_run_that_takes_longer_than_those_before(tmp_path):
    shown = io.StringIO()
    console = rich.console.Console(file=shown, width=80, force_terminal=True)
    options = {"workdir": tmp_path, "workers": 1, "noun": "item", "console": console}
    items = [Item(tmp_path, name) for name in ("quick", "slow")]
    run_all(items, functools.partial(overdue, shown=shown), lambda records: None, **options)


def test_a_table_is_printed_to_its_last_requested_row(console):
    print_grid(console, Grid("Title", ("name", "value"), [("a", "1"), ("b", "2")]), dimmed=[0], rows=1)
    printed = console.export_text()
    assert "Title" in printed and "a" in printed and "2" not in printed
