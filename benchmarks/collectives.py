"""Communication of a compiled program: every collective in its text, with the bytes of its result."""

import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4} | {
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
"""Bytes of one element, by XLA type."""

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
    """Bytes of the result on each device."""
    devices: int
    """Number of devices that communicate in it."""
    times: int
    """How often the program runs it; more than once inside loops."""
    source: str
    """`op_name` of the traced operation that it comes from."""

    @property
    def sent(self) -> int:
        """Bytes that each device sends in one run with ring algorithms, which is optimal for large arrays.

        A device sends (n − 1) / n of the whole array, and twice that in an all-reduce. The result of a reduce-scatter
        is 1/n of the whole array.
        """
        if self.kind.startswith("collective"):
            return self.bytes
        whole = self.bytes * (self.devices if self.kind == "reduce-scatter" else 1)
        return round(whole * (self.devices - 1) / self.devices) * (2 if self.kind == "all-reduce" else 1)


def read(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program, from its `as_text()`.

    Raises:
      ValueError: A collective is in a loop of unknown length, or has a type of unknown size.
    """
    entry, computations = _computations(text)
    return list(_within(entry, computations, 1))


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    entry, name, found = "", "", {}
    for line in map(str.strip, text.splitlines()):
        # XLA numbers the members of long tuples in comments.
        line = re.sub(r"/\*.*?\*/", "", line)  # noqa: PLW2901
        if opened := _COMPUTATION.match(line):
            name = opened[2]
            found[name] = []
            entry = name if opened[1] else entry
        elif name:
            found[name].append(line)
    return entry, found


def _within(name: str, computations: dict[str, list[str]], times: int | None) -> Iterator[Collective]:
    """Yields the collectives of a computation and its callees; `times` is None in a loop of unknown length."""
    for line in computations[name]:
        call = _CALL.match(line)
        if not call or call["form"] in ("-update", "-done"):
            continue
        kind = call["name"]
        if kind in KINDS:
            if times is None:
                raise ValueError(f"{kind} is in a loop of unknown length: {line[:120]}")
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
    """Returns the part of an asynchronous start's shape, (operands, results, …), that holds the results.

    The shape of an all-reduce's start holds the results alone.
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
      ValueError: A type is unknown.
    """
    total = 0
    for kind, dimensions in re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape):
        if kind not in BYTES:
            raise ValueError(f"{kind} is a type of unknown size in {shape}")
        count = 1
        for dimension in filter(None, dimensions.split(",")):
            count *= int(dimension)
        total += BYTES[kind] * count
    return total


def _group(line: str) -> int:
    """Returns the number of devices in a line's first group, written {{0,1},{2,3}} or [groups,devices]<=[…]."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if shortened := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(shortened[1])
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return pairs[1].count("{") if pairs else 1
