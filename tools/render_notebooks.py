"""Renders ``notebooks/NAME.py``, the source, into ``notebooks/NAME.ipynb``: run, with what its cells show.

    python tools/render_notebooks.py [--check] [FILES ...]

A rendering depends on the text and on the versions of the libraries alone: it keeps no times, no random
cell ids and nothing of the machine. A notebook that fails, or warns, is not written. ``--check`` runs
nothing; it tells which renderings are of another text.
"""

import itertools
import sys
from pathlib import Path
from typing import Annotated

import jupytext
import nbformat
import tyro
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from traitlets.config import Config

from experiments.lab.records import write_atomically

ROOT = Path(__file__).resolve().parent.parent
CELL_SECONDS = 120
"""A notebook is a matter of seconds; whatever takes this long hangs."""


class RenderError(Exception):
    """A notebook failed, or wrote a warning."""


def read_text(path: Path) -> NotebookNode:
    """The notebook that a percent text describes, without outputs; ids count the cells."""
    notebook = jupytext.read(path, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{path.stem}-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
    return notebook


def render(path: Path) -> None:
    """Run the notebook of a text, from the root of the checkout, and write its rendering beside it.

    Raises:
        RenderError: where a cell raises, or writes to stderr; an older rendering stays as it is.
    """
    notebook = read_text(path)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        config=Config(KernelManager={"transport": "ipc"}),  # no ports, which others could listen to
        timeout=CELL_SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(ROOT)}},
    )
    metadata = notebook.metadata.copy()
    try:
        client.execute()
    except CellExecutionError as error:
        raise RenderError(f"{path}: a cell fails\n{error}") from error
    notebook.metadata = metadata  # the kernel added its exact version
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RenderError(f"{path}: the cell {cell.id} writes to stderr\n{output.text}")
    write_atomically(path.with_suffix(".ipynb"), nbformat.writes(notebook) + "\n")


def difference(path: Path) -> str | None:
    """How the rendering of a text differs from it, None where it does not."""
    rendering = path.with_suffix(".ipynb")
    if not rendering.exists():
        return f"{rendering} is missing"
    wanted, found = (
        [(cell.cell_type, cell.source) for cell in notebook.cells]
        for notebook in (read_text(path), nbformat.read(rendering, as_version=4))
    )
    pairs = enumerate(itertools.zip_longest(wanted, found))
    first = next((number for number, (text, shown) in pairs if text != shown), None)
    return None if first is None else f"{rendering} differs from {path.name} from cell {first} on"


def main(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    check: bool = False,
) -> int:
    """Run the notebooks and render them.

    Args:
        files: percent texts; all of notebooks/ by default.
        check: compare the texts with the renderings that are there, and run nothing.
    """
    failures = []
    for path in files or sorted((ROOT / "notebooks").glob("*.py")):
        try:
            failure = difference(path) if check else render(path)
        except RenderError as error:
            failure = str(error)
        if failure:
            failures.append(failure)
        elif not check:
            print(path.with_suffix(".ipynb"))
    if failures:
        advice = ["run `make notebooks`"] if check else []
        print("\n".join([*failures, *advice]), file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
