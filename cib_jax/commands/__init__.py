"""The modes of run.py, one file each."""
