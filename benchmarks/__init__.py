"""Speed measured side by side: `python -m benchmarks.NAME` runs both sides in turn, prints a table and the machine.

No result is asserted, and `cib_jax` never imports this package. The libraries of the other side are installed by
`pip install -e '.[benchmark]'`.
"""
