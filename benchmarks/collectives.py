"""What a compiled program sends between devices: every collective in its text, with the bytes that it leaves behind."""

import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4} | {
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
"""Of an element of each type of XLA's."""

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_CALL = re.compile(
    r"^(?:ROOT )?%?[\w.-]+ = (?P<shape>\(.*?\)|\S+) (?P<name>[\w-]+?)(?P<form>-start|-update|-done)?\((?P<operands>.*)$"
)
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|\w+_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    bytes: int
    """Of its result on each device."""
    devices: int
    """How many exchange with each other in it."""
    times: int
    """How often the program runs it: more than once inside loops."""
    source: str
    """The name under which the program was traced, which tells the operation it comes from."""

    @property
    def sent(self) -> int:
        """Bytes that each device sends in one run, by rings, the least that is possible for large arrays.

        Of the whole array, which a reduce-scatter's result is 1/n of: (n − 1) / n, of an all-reduce twice as much.
        """
        if self.kind.startswith("collective"):
            return self.bytes
        whole = self.bytes * (self.devices if self.kind == "reduce-scatter" else 1)
        return round(whole * (self.devices - 1) / self.devices) * (2 if self.kind == "all-reduce" else 1)


def read(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program, from its `as_text()`.

    Raises:
      ValueError: one stands in a loop of unknown length, or has a type of unknown size.
    """
    entry, computations = _computations(text)
    return list(_within(entry, computations, 1))


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    entry, name, found = "", "", {}
    for line in map(str.strip, text.splitlines()):
        # Long tuples have their members numbered in comments.
        line = re.sub(r"/\*.*?\*/", "", line)  # noqa: PLW2901
        if opened := _COMPUTATION.match(line):
            name = opened[2]
            found[name] = []
            entry = name if opened[1] else entry
        elif name:
            found[name].append(line)
    return entry, found


def _within(name: str, computations: dict[str, list[str]], times: int | None) -> Iterator[Collective]:
    """Yields the collectives of a computation and of those that it calls; `times` is None in a loop of any length."""
    for line in computations[name]:
        call = _CALL.match(line)
        if not call or call["form"] in ("-update", "-done"):
            continue
        kind = call["name"]
        if kind in KINDS:
            if times is None:
                raise ValueError(f"{kind} stands in a loop of unknown length: {line[:120]}")
            result = _result(kind, call["shape"]) if call["form"] else call["shape"]
            source = re.search(r'op_name="([^"]*)"', line)
            yield Collective(kind, size(result), _group(line), times, source[1] if source else "")
            continue
        inner = times
        if kind == "while":
            trips = _TRIPS.search(line)
            inner = times * int(trips[1]) if trips and times is not None else None
        for one, several in _CALLED.findall(line):
            for called in [one] if one else re.findall(r"[\w.-]+", several):
                yield from _within(called, computations, inner)


def _result(kind: str, shape: str) -> str:
    """Returns the result's part in the shape of a form that starts now and ends later: (operands, results, …).

    An all-reduce's has the results alone.
    """
    if kind == "all-reduce":
        return shape
    depth, cuts = 0, [0]
    for at, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 1:
            cuts.append(at)
    return shape[cuts[1] : (*cuts[2:], len(shape))[0]]


def size(shape: str) -> int:
    """Returns the bytes of a shape such as "(f32[64,64]{1,0}, f32[])".

    Raises:
      ValueError: a type is unknown.
    """
    total = 0
    for kind, dimensions in re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape):
        if kind not in BYTES:
            raise ValueError(f"{kind}: a type of unknown size in {shape}")
        count = 1
        for dimension in filter(None, dimensions.split(",")):
            count *= int(dimension)
        total += BYTES[kind] * count
    return total


def _group(line: str) -> int:
    """Returns how many devices a line's first group has: {{0,1},{2,3}} or, shortened, [groups,devices]<=[…]."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if shortened := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(shortened[1])
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return pairs[1].count("{") if pairs else 1
