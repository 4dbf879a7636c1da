"""The cells of a comparison: one run each, in a folder of its own, taken by whoever is free."""

import difflib
import hashlib
import pathlib
import re
import time
from typing import Any, NamedTuple

import ml_collections
import rich.console

from cib_jax.baselines import BASELINES
from cib_jax.config import checking, field_values
from cib_jax.config.field_values import ConfigError
from cib_jax.errors import Refusal
from cib_jax.jobs import baseline
from cib_jax.jobs import workdir as workdir_lib
from cib_jax.jobs.train import TrainingError, train
from cib_jax.objective import OBJECTIVES
from cib_jax.training import place

TITLES = {"naive_cl": "NaiveCL", "cl_hash": "CLHash", "cibhash": "CIBHash", "diffusion": "Diffusion"} | {
    name: known.title for name, known in BASELINES.items()
}
"""How tables name the methods; the first three as in the paper's ablation."""

REFUSED = "refused.json"


class Method(NamedTuple):
    """A row of a comparison."""

    name: str
    fields: dict[str, Any]
    """Config fields, by dotted name, that this row sets otherwise."""

    @property
    def title(self) -> str:
        """As tables name it."""
        return " ".join([TITLES[self.name], *(f"{name}={value}" for name, value in self.fields.items())])

    @property
    def slug(self) -> str:
        """As its folder is named: different for different rows."""
        if not self.fields:
            return self.name
        told = "-".join([self.name, *(f"{name}={value}" for name, value in self.fields.items())])
        # What cannot stand in a file's name becomes "_"; the digest keeps rows apart that differ in such letters alone.
        digest = hashlib.sha256(told.encode()).hexdigest()[:6]
        return re.sub(r"[^\w.=+-]", "_", told) + f"-{digest}"


class Cell(NamedTuple):
    """One run of a comparison."""

    method: Method
    config: ml_collections.ConfigDict
    workdir: pathlib.Path


def methods(words: str) -> list[Method]:
    """Returns the rows that `compare.methods` names.

    Raises:
      ConfigError: a name or a field is unknown, a value does not fit, or a row is there twice.
    """
    found: list[Method] = []
    for part in words.split(","):
        if not part.strip():
            continue
        name, *assignments = part.split()
        if name not in TITLES:
            near = difflib.get_close_matches(name, TITLES, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"config.compare.methods: {name!r} is unknown; {hint}There are {', '.join(TITLES)}")
        method = Method(name, dict(_assigned(name, words) for words in assignments))
        if method in found:
            raise ConfigError(f"config.compare.methods: {part.strip()!r} is there twice; leave one out")
        found.append(method)
    if not found:
        raise ConfigError("config.compare.methods: it names no method; try 'itq, cibhash'")
    return found


def _assigned(method: str, words: str) -> tuple[str, Any]:
    name, sign, value = words.partition("=")
    where = f"config.compare.methods: {method} {words}"
    if not sign:
        raise ConfigError(f"{where}: after a method come fields with values, such as temperature=0.5")
    if name in {"bits", "seed", "objective", "k"} or name.startswith("data."):
        raise ConfigError(f"{where}: all rows share this field, or their figures would not compare")
    if name not in field_values.FIELDS or name in field_values.AROUND:
        near = difflib.get_close_matches(name, field_values.FIELDS, 1)
        raise ConfigError(f"{where}: no field has this name{f'; did you mean {near[0]}?' if near else ''}")
    return name, field_values.parsed(name, value, where)


def numbers(text: str) -> list[int]:
    """Returns the numbers of a list such as "16, 32, 64", each once."""
    return list(dict.fromkeys(int(number) for number in text.split(",")))


def cell(base: ml_collections.ConfigDict, method: Method, bits: int, seed: int, root: pathlib.Path) -> Cell:
    """Returns the run of one method with one length and one seed, checked.

    Raises:
      ConfigError: its config cannot work.
    """
    config = base.copy_and_resolve_references()
    # A report of each would take longer than some of the methods; --mode=evaluate --config.report.write=True draws that
    # of a trained cell.
    config.update_from_flattened_dict({"report.write": False} | method.fields | {"bits": bits, "seed": seed})
    folder = f"{bits}-bits-seed-{seed}"
    config.train.checkpoint_dir = place.within(config.train.checkpoint_dir, method.slug, folder)
    if method.name in OBJECTIVES:
        config.objective = method.name
    checking.check(config)
    return Cell(method, config, root / method.slug / folder)


def finished(one: Cell) -> dict[str, Any] | None:
    """Returns the results of a cell, None if it has none yet."""
    path = one.workdir / "results.json"
    return workdir_lib.read_json(path) if path.exists() else None


def refused(one: Cell, since: float = 0.0) -> str:
    """Returns why a cell could not be measured, if that was `since` a time; "" where nothing speaks against it."""
    path = one.workdir / REFUSED
    if not path.exists():
        return ""
    note = workdir_lib.read_json(path)
    return str(note["error"]) if note["when"] >= since else ""


def measure(one: Cell) -> dict[str, Any] | None:
    """Runs a cell to its end, or goes on with it; returns its results, None if it was refused, which it notes.

    Raises:
      BusyError: another process is at it.
      Refusal: what is wrong is not this row's own: the data, the weights, a field that all rows share.
    """
    quiet = rich.console.Console(quiet=True)
    note = one.workdir / REFUSED
    try:
        if one.method.name in OBJECTIVES:
            results = train(one.config, one.workdir, console=quiet)
        else:
            results = baseline.measure(one.config, one.method.name, one.workdir, console=quiet)
    except workdir_lib.BusyError:
        raise
    except Refusal as error:
        if not (one.method.fields or isinstance(error, baseline.BaselineError | TrainingError)):
            raise
        one.workdir.mkdir(parents=True, exist_ok=True)
        workdir_lib.write_json(note, {"error": str(error), "when": time.time()})
        return None
    note.unlink(missing_ok=True)
    return results
