"""From a trained encoder to packed codes: the hasher, and all that it is read from and written to."""
