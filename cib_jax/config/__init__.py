"""A configuration: its fields, whether they make sense, and what they stand for."""
