"""The built-in demo data: made where it is not there yet, then read like a user's own."""

from __future__ import annotations

import os
from pathlib import Path

from stexp.data.demo import write_demo
from stexp.data.readers import samplesheet
from stexp.data.readers.paths import user_path
from stexp.data.section import Section
from stexp.errors import InputError


def read_demo(root: str | Path, seed: int = 0, patients: int = 4, sections_per_patient: int = 2) -> list[Section]:
    """Sections of the demo data in `root`; see `write_demo` for the arguments.

    Demo data made with other arguments stays, and so do other files.

    Raises
    ------
    InputError
        The demo would be written beside the data sets that ``STEXP_DATA`` names, or cannot be written.
    """
    folder = user_path(root)
    _refuse_foreign(folder)
    sheet = write_demo(folder, patients=patients, sections_per_patient=sections_per_patient, seed=seed)
    return samplesheet.read_samplesheet(sheet)


def _refuse_foreign(folder: Path) -> None:
    """InputError where a new demo would lie in a folder of ``STEXP_DATA`` that holds other data, or is read-only."""
    place = os.environ.get("STEXP_DATA")
    parent = folder.absolute().parent.resolve()
    if not place or parent != user_path(place).resolve() or not parent.is_dir() or (folder / "demo.json").is_file():
        return
    others = sorted(
        path.name for path in parent.iterdir() if not path.name.startswith(".") and path.name != folder.name
    )
    if others or not os.access(parent, os.W_OK):
        why = f"holds {', '.join(others[:3])}" if others else "is read-only"
        raise InputError(
            f"data=demo would be written to {folder}, and STEXP_DATA={place} {why}; give data.root=data/demo, or "
            f"another folder for the demo"
        )
