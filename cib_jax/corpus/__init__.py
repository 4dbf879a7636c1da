"""Packed codes of many files in a folder of parts, which many processes fill."""
