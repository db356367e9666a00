"""The built-in demo data: made where it is not there yet, then read like a user's own."""

from __future__ import annotations

from pathlib import Path

from stexp.data.demo import write_demo
from stexp.data.readers import samplesheet
from stexp.data.readers.paths import user_path
from stexp.data.section import Section


def read_demo(root: str | Path, seed: int = 0, patients: int = 4, sections_per_patient: int = 2) -> list[Section]:
    """Sections of the demo data in `root`; see `write_demo` for the arguments.

    Demo data made with other arguments is replaced; other files are not touched.
    """
    sheet = write_demo(user_path(root), patients=patients, sections_per_patient=sections_per_patient, seed=seed)
    return samplesheet.read_samplesheet(sheet)
