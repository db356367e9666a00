"""Which patient each section is of, where the files of the sections do not say it."""

from __future__ import annotations

import logging
from pathlib import Path

from stexp.data.readers.formats import TEXT
from stexp.data.readers.text import read_table
from stexp.errors import InputError

log = logging.getLogger(__name__)


def read_patients(file: Path, names: list[str]) -> dict[str, str]:
    """The patient of each section by ``patients.csv`` (section, patient); without the file, its own name.

    Raises
    ------
    InputError
        Columns are missing, a section stands there twice, or one of `names` does not.
    """
    if not file.is_file():
        if len(names) > 1:
            log.warning("no %s (section,patient): each of %d sections counts as a patient of its own", file, len(names))
        return {name: name for name in names}
    table = read_table(file, "patients", skipinitialspace=True, **TEXT).fillna("")
    table.columns = table.columns.str.strip()
    if not {"section", "patient"} <= set(table.columns):
        raise InputError(f"{file} has the columns {', '.join(table.columns)}; it needs section and patient")
    patients = dict(zip(table["section"].str.strip(), table["patient"].str.strip(), strict=True))
    if len(patients) < len(table):
        raise InputError(f"{file} names a section twice: {len(table)} rows, {len(patients)} sections")
    missing = [name for name in names if not patients.get(name)]
    if missing:
        raise InputError(f"{file} names no patient for section {', '.join(missing)}")
    return patients
