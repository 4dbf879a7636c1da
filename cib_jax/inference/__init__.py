"""A trained encoder in use."""
