"""Executes notebooks from top to bottom and writes their outputs into them.

python notebooks/execute.py notebooks/functional_api.ipynb
python notebooks/execute.py notebooks/cib_cifar_tpu.ipynb --settings 'data_dir = "DIR"'

Needs nbclient and ipykernel (`pip install -e '.[test]'`). The kernel works in an empty folder and imports cib_jax from
this clone. The settings are run after the cell tagged `parameters` and are not saved, nor are times and paths.
"""

import argparse
import os
import pathlib
import tempfile

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARAMETERS = "parameters"
"""Tag of the cell with a notebook's settings, as in papermill."""


def execute(path: pathlib.Path, settings: str, folder: pathlib.Path) -> nbformat.NotebookNode:
    """Runs all cells of a notebook once, in order, and returns it with their outputs.

    Args:
      path: Notebook, which is not changed.
      settings: Lines of Python that are run as a cell after the parameters.
      folder: Working directory of the kernel.

    Raises:
      nbclient.exceptions.CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    position = 1 + next(i for i, cell in enumerate(notebook.cells) if PARAMETERS in cell.metadata.get("tags", ()))
    notebook.cells.insert(position, nbformat.v4.new_code_cell(settings))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    nbclient.NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute(env=environment)
    del notebook.cells[position]
    count = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            # Progress bars, which a reader of the saved copy does not need; "\x1b[2K" clears their line.
            cell.outputs = [output for output in cell.outputs if "\x1b[2K" not in output.get("text", "")]
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    # The other entries depend on the version of the kernel.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def main() -> None:
    """Executes the notebooks given on the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("notebooks", nargs="+", type=pathlib.Path)
    arguments.add_argument("--settings", default="", help="lines of Python, run after the cell of parameters")
    given = arguments.parse_args()
    for path in given.notebooks:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, given.settings, pathlib.Path(folder))
        text = nbformat.writes(notebook) + "\n"
        for private in (folder, str(ROOT), str(pathlib.Path.home())):
            if private in text:
                raise SystemExit(f"{path}: an output contains the private path {private}; nothing was written")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
