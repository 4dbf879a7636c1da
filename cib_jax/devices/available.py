"""The devices that JAX works on: those that were asked for, or a sentence; and what it says of those it passes by."""

import contextlib
import logging
from collections.abc import Callable, Iterator

import jax

from cib_jax.devices.parallel import DevicesError


def set_up(tell: Callable[[str], None]) -> None:
    """Has JAX set up its devices, after the processes of a run have joined and before anything is computed.

    Args:
      tell: told what JAX says of an accelerator that is there and that it cannot use.

    Raises:
      DevicesError: JAX_PLATFORMS names a kind of which there is none.
    """
    with _heard() as said:
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:  # the latter for a kind whose plugin is not installed
            wanted = jax.config.values["jax_platforms"]
            if not wanted:
                raise
            reason = str(error).partition(" (set JAX_PLATFORMS")[0].splitlines() or ["none is installed for it"]
            raise DevicesError(
                f"JAX_PLATFORMS: {wanted!r} is asked for, and JAX finds no such device ({reason[0]}); pip install "
                "'jax[cuda13]' has it find NVIDIA GPUs, and without the variable it takes what there is"
            ) from error
    for words in said:
        kind = jax.devices()[0].platform
        tell(
            f"JAX leaves an accelerator unused ({words.rstrip('.')}); this run goes on, on {kind}: pip install "
            "'jax[cuda13]' has it use NVIDIA GPUs, JAX_PLATFORMS=cuda refuses to go on without, JAX_PLATFORMS=cpu says "
            "that a CPU is meant"
        )


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """Yields a list of what JAX warns of meanwhile, whatever the level of other logs."""
    said: list[str] = []
    log, handler = logging.getLogger("jax"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level, propagates = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagates
