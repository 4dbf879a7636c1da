"""The folder, context and cached features of one run."""
