"""Columns of files: paths of any bytes, and values that are not known."""

import os
import subprocess
import sys

import pyarrow

from cib_jax.storage.rows import file_columns, path_of


def test_paths_of_any_bytes_come_back():
    paths = ["a b/ä.jpg", os.fsdecode(b"caf\xe9.jpg"), "\\udce9.jpg", ""]
    columns = file_columns(paths, [1, None, 3, 4], [0, 1_700_000_000_123_456_789, None, -5], ["", "cut", "", ""])
    table = pyarrow.table(columns)
    assert [path_of(row) for row in table.to_pylist()] == paths
    assert table["raw_path"].to_pylist() == [None, b"caf\xe9.jpg", None, None]
    assert table["path"].to_pylist()[1] == "caf\\udce9.jpg"
    assert table["size"].to_pylist() == [1, None, 3, 4]
    assert table["modified"].cast("int64").to_pylist() == [0, 1_700_000_000_123_456_789, None, -5]
    assert table["reason"].to_pylist() == [None, "cut", None, None]


def test_paths_are_names_of_files_where_the_locale_is_not_utf_8():
    program = (
        "import os; from cib_jax.storage.rows import path_of; "
        "print(os.fsencode(path_of({'path': '\\xe9.jpg', 'raw_path': None})))"
    )
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=ascii_only, capture_output=True, check=False)
    assert done.stdout.strip() == repr("é.jpg".encode()).encode()
