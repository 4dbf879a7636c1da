"""One file per experiment, each with a `get_config()`; imported as `cib_jax.configs`, in a clone and from a wheel."""
