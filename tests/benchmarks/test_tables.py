"""The blocks of docs/results.md that benchmarks/tables.py writes."""

import pytest

from benchmarks import tables

PAGE = tables.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", tables.COMMANDS)
def test_a_block_is_replaced_and_the_rest_is_kept(name):
    before, _, rest = PAGE.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    replaced = tables.replace_block(PAGE, name, "| a table |")
    assert replaced.startswith(before) and replaced.endswith(end + after)
    block = replaced[len(before) : len(replaced) - len(end + after)]
    assert "| a table |" in block and "python run.py --mode=compare" in block
    assert tables.replace_block(replaced, name, "| a table |") == replaced


def test_a_page_without_the_block_is_refused():
    with pytest.raises(ValueError, match="digits"):
        tables.replace_block("# Results", "digits", "| a table |")
