"""Old module paths `cib_jax.jobs.*`, which work for one more release; use the public names of `cib_jax` instead."""

import importlib
import sys
import types
import warnings
from typing import Any

__path__: list[str] = []  # makes this file a package, whose modules are entered in sys.modules below

_MOVED = {
    **{
        mode: mode
        for mode in ("train", "evaluate", "compare", "tune", "encode", "index", "search", "duplicates", "serve")
    },
    "beside_notebook": "serve",
}


class _MovedModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        old = self.__name__.rpartition(".")[2]
        target = importlib.import_module(f"cib_jax.commands.{_MOVED[old]}")
        warnings.warn(f"{self.__name__} has moved to {target.__name__}", DeprecationWarning, stacklevel=2)
        return getattr(target, "serve_notebook" if (old, name) == ("beside_notebook", "serve") else name)


for _old in _MOVED:
    sys.modules[f"{__name__}.{_old}"] = _MovedModule(f"{__name__}.{_old}")
