"""Settings shared by all tests: CPU, one compilation cache, a hypothesis profile without deadlines; a fixture."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# In the environment, so that processes that tests start take what others have compiled.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parent.parent / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("cib", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("cib")


@pytest.fixture(scope="module")
def compiled_quickly():
    """For programs that run for moments, compiled for seconds: XLA's own passes alone, few of LLVM's.

    Not for what is compared with the bits that a started process comes to.
    """
    # What is compiled already is forgotten: JAX would take it for the same program, and the bits are others.
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
