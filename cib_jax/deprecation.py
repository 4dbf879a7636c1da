"""Old keyword arguments of public functions, accepted for one release."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def renamed_keywords(**renamed: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Returns a decorator that accepts old keywords with a DeprecationWarning: `@renamed_keywords(old="new")`."""

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def with_old_keywords(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            given: dict[str, Any] = dict(kwargs)
            for old, new in renamed.items():
                if old not in given:
                    continue
                if new in given:
                    raise TypeError(f"{function.__name__}: {old} is the old name of {new}; give {new} alone")
                warnings.warn(
                    f"{function.__name__}: the keyword {old} is now {new} and will be removed in the next release",
                    DeprecationWarning,
                    stacklevel=2,
                )
                given[new] = given.pop(old)
            return function(*args, **given)

        return with_old_keywords

    return decorate
