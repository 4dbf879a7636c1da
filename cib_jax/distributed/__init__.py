"""Devices and processes that share one computation."""
