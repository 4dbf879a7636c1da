"""Speed measured side by side: `python -m benchmarks.NAME` runs both sides in turn, prints a table and the machine.

Nothing here is asserted, and nothing of `cib_jax` depends on it. The other side's libraries come with
`pip install -e '.[benchmark]'`.
"""
