"""Old path of `cib_jax.data.zip_archive`, which works for one more release."""

from cib_jax.data.zip_archive import unzip

__all__ = ["unzip"]
