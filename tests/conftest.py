"""Settings shared by all tests: CPU, one compilation cache, a hypothesis profile without deadlines."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax

CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

hypothesis.settings.register_profile("cib", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("cib")
