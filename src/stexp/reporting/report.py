"""The report of a folder: the page of a run, that of a predicted slide, or that of a completed section."""

from __future__ import annotations

from pathlib import Path

from stexp.completion.result import RESULT
from stexp.errors import InputError
from stexp.evaluation.predictions import is_of_a_slide
from stexp.evaluation.prototype_record import FACTS
from stexp.files import write_atomically
from stexp.reporting.completion_page import completion_page
from stexp.reporting.prediction_page import prediction_page
from stexp.reporting.prototype_page import NAME, prototype_page
from stexp.reporting.run_page import run_page


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into the folder of a run, or of a predicted slide, whole or not at all.

    Of a run that learned prototypes ``prototypes.html``, too.

    Parameters
    ----------
    folder
        With predictions.h5ad, metrics.json, per_gene.csv, audit.json and provenance.json; of a predicted slide with
        predictions.h5ad and provenance.json; of a completed section with result.json, predictions.h5ad, per_gene.csv.

    Returns
    -------
    Path
        The report.

    Raises
    ------
    InputError
        The folder or one of its files is missing, or is not what its name says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give that of a run or of a predicted slide, as in run=runs/x")
    if (folder / FACTS).is_file():
        write_atomically(folder / NAME, prototype_page(folder))
    if (folder / RESULT).is_file():
        page = completion_page(folder)
    else:
        page = prediction_page(folder) if is_of_a_slide(folder / "predictions.h5ad") else run_page(folder)
    write_atomically(folder / "report.html", page)
    return folder / "report.html"
