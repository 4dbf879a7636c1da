"""Executes notebooks from top to bottom and writes their outputs into them.

python notebooks/execute.py notebooks/functional_api.ipynb
python notebooks/execute.py notebooks/cib_cifar_tpu.ipynb --settings 'data_dir = "DIR"'

Wants nbclient and ipykernel (`pip install -e '.[test]'`). The kernel's folder is an empty one, and cib_jax is that of
this clone. The settings are run after the cell tagged `parameters` and are not kept, nor are times and paths.
"""

import argparse
import os
import pathlib
import tempfile

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARAMETERS = "parameters"
"""The tag of the cell with a notebook's settings, as papermill has it."""


def executed(path: pathlib.Path, settings: str, folder: pathlib.Path) -> nbformat.NotebookNode:
    """Returns a notebook with the outputs of all its cells, each of which was run once, in order.

    Args:
      path: of the notebook, which is not written to.
      settings: lines of Python that are run as a cell of their own behind the parameters.
      folder: where the kernel works.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    place = 1 + next(i for i, cell in enumerate(notebook.cells) if PARAMETERS in cell.metadata.get("tags", ()))
    notebook.cells.insert(place, nbformat.v4.new_code_cell(settings))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    nbclient.NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute(env=environment)
    del notebook.cells[place]
    count = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    # Of the kernel's own words on itself, only what does not change with its version.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def main() -> None:
    """Executes the notebooks that the command line names."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("notebooks", nargs="+", type=pathlib.Path)
    arguments.add_argument("--settings", default="", help="lines of Python, run behind the cell of parameters")
    given = arguments.parse_args()
    for path in given.notebooks:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, given.settings, pathlib.Path(folder))
        text = nbformat.writes(notebook) + "\n"
        for private in (folder, str(ROOT), str(pathlib.Path.home())):
            if private in text:
                raise SystemExit(f"{path}: an output names {private}, which is this machine's own; nothing is written")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
