"""Data sets by name: ``stexp.datasets.demo()``."""

from __future__ import annotations

import os
from pathlib import Path

from stexp.api.sections import read_demo
from stexp.api.typed import typed
from stexp.data.section import Section


@typed
def demo(
    root: str | Path | None = None, *, patients: int = 4, sections_per_patient: int = 2, seed: int = 0
) -> list[Section]:
    """Generated sections with tissue, stain and expression that hang together; made in seconds where they are not.

    Parameters
    ----------
    root
        Folder that they are written to, once; None: ``demo`` in the folder that ``STEXP_DATA`` names, else
        ``data/demo``, as ``stexp-train`` has it.
    patients, sections_per_patient
        How many.
    seed
        Of all that is drawn.

    Examples
    --------
    >>> sections = stexp.datasets.demo(patients=3, sections_per_patient=1)
    >>> [section.name for section in sections]
    ['A1', 'B1', 'C1']
    """
    folder = Path(os.environ.get("STEXP_DATA", "data")) / "demo" if root is None else root
    return read_demo(folder, seed=seed, patients=patients, sections_per_patient=sections_per_patient)
