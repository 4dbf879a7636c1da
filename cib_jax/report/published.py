"""Figures that papers published, to stand beside measured ones; none of them was measured by this project."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Published(NamedTuple):
    """A row of a published table."""

    title: str
    values: Mapping[int, Sequence[float]]
    """MAP by code length."""


_CIBHASH = {
    ("cifar10-10k-50k", 1000): ((0.590, 0.622, 0.641), (0.532, 0.573, 0.578), (0.305, 0.325, 0.349)),
    ("nuswide-2100", 5000): ((0.790, 0.807, 0.815), (0.717, 0.725, 0.735), (0.627, 0.645, 0.664)),
    ("coco-5000", 5000): ((0.737, 0.760, 0.775), (0.706, 0.735, 0.722), (0.598, 0.624, 0.648)),
}
"""CIBHash, IJCAI 2021, table 1, by protocol and k: CIBHash, TBH and ITQ, on VGG-16's fc7 features."""


def rows(protocol: str, k: int) -> list[Published]:
    """Returns what was published under a protocol, by its name, and a k; nothing where no table is known."""
    lines = _CIBHASH.get((protocol, k), ())
    titles = ("CIBHash (VGG-16)", "TBH (VGG-16)", "ITQ (VGG-16)")
    return [
        Published(title, {bits: (value,) for bits, value in zip((16, 32, 64), line, strict=True)})
        for title, line in zip(titles, lines, strict=False)
    ]
