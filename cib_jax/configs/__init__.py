"""The experiments that come along, one file each: in a clone those of configs/, which a wheel holds at this place."""

import pathlib

__path__ = [str(pathlib.Path(__file__).resolve().parents[2] / "configs")]
