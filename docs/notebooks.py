"""Run the tutorials and keep their outputs: ``python docs/notebooks.py [--check] [names]``; all without names.

Each runs in a folder of its own under ``build/notebooks``, so that paths in its outputs are relative. With ``--check``
it only has to run: nothing is written.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
WORK = HERE.parent / "build" / "notebooks"
PROGRESS = re.compile(r"[^\n]*\r(?!\n)")
"""A line that the next one is printed over."""
LARGE = 120_000
"""Bytes of a picture from which on it is kept as JPEG."""
WIDEST = 1400


def execute(path: Path, write: bool) -> None:
    """Run a notebook from the start."""
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # bars in colour, which no output keeps
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    folder = WORK / path.stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    if write:
        nbformat.write(cleaned(notebook), path)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs between two runs that say the same: times, and lines that were printed over."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = PROGRESS.sub("", output.text)
            elif "image/png" in output.get("data", {}):
                _compress(output.data)
    return notebook


def _compress(data: nbformat.NotebookNode) -> None:
    """A large picture as JPEG instead of PNG."""
    png = base64.b64decode(data["image/png"])
    if len(png) < LARGE:
        return
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((WIDEST, WIDEST))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=82, optimize=True)
    del data["image/png"]
    data["image/jpeg"] = base64.b64encode(jpeg.getvalue()).decode()


def main(arguments: list[str]) -> None:
    names = [argument for argument in arguments if argument != "--check"]
    paths = [HERE / "tutorials" / f"{name}.ipynb" for name in names] or sorted((HERE / "tutorials").glob("*.ipynb"))
    for path in paths:
        print(f"running {path.name}", flush=True)
        execute(path, write="--check" not in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
