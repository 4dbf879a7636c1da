"""Codes and photos on disk."""
