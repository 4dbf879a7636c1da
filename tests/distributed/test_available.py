"""Devices that were asked for and are not there, and those that are there and not used, are told of."""

import logging
import re

import jax
import pytest

from cib_jax.distributed import initialize
from cib_jax.errors import DevicesError


def test_an_idle_gpu_is_told_of_whatever_the_level_of_logs(monkeypatch):
    """JAX says it in its log, which the program keeps quiet."""
    found = jax.devices()

    def as_jax_does():
        logging.getLogger("jax._src.xla_bridge").warning("An NVIDIA GPU may be present. Falling back to %s.", "cpu")
        return found

    monkeypatch.setattr(jax, "devices", as_jax_does)
    monkeypatch.setattr(logging.root, "level", logging.CRITICAL)
    log = logging.getLogger("jax")
    before, told = (log.level, log.propagate, list(log.handlers)), []
    initialize.set_up_devices(told.append)
    assert len(told) == 1
    assert told[0].startswith("JAX leaves an accelerator unused (An NVIDIA GPU may be present. Falling back to cpu); ")
    assert (log.level, log.propagate, log.handlers) == before


@pytest.mark.parametrize("wanted", ["", "tpu"])
def test_an_error_of_jax_is_a_refusal_only_of_a_kind_that_was_asked_for(monkeypatch, request, wanted):
    def broken():
        raise RuntimeError("all is lost (set JAX_PLATFORMS='' to choose)")

    request.addfinalizer(lambda kept=jax.config.values["jax_platforms"]: jax.config.update("jax_platforms", kept))
    jax.config.update("jax_platforms", wanted)
    monkeypatch.setattr(jax, "devices", broken)
    told = "JAX_PLATFORMS: 'tpu' is asked for, and JAX finds no such device (all is lost)" if wanted else "all is lost"
    with pytest.raises(DevicesError if wanted else RuntimeError, match=re.escape(told)):
        initialize.set_up_devices(print)
