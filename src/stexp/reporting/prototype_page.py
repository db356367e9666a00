"""The page of a run's prototypes: the tiles nearest to each, and the expression it stands for."""

from __future__ import annotations

import base64
from pathlib import Path

from stexp.data.slides import pictures
from stexp.data.slides.pictures import SHEET_COLUMNS, SHEET_PX
from stexp.evaluation.prototype_record import TILES, read_prototypes
from stexp.evaluation.records import read_metrics
from stexp.reporting.page import render

NAME = "prototypes.html"


def prototype_page(run: Path) -> str:
    """One file without a script, from ``prototypes.json`` and ``prototypes.h5`` of a run folder."""
    record, (_, sheet) = read_prototypes(run), pictures.read(run / TILES)
    metrics = read_metrics(run)
    place = {} if sheet is None else {name: i for i, name in enumerate(sheet.names)}
    shown = [
        {
            **each,
            "tiles": [
                {"name": name, "x": place[name] % SHEET_COLUMNS, "y": place[name] // SHEET_COLUMNS}
                for name in each["tiles"]
                if name in place
            ],
        }
        for each in record["prototypes"]
    ]
    return render(
        "prototypes.html.j2",
        model=metrics["model"],
        data=metrics["data"],
        fold=metrics["fold"],
        prototypes=shown,
        of=record["of"],
        references=record["references"],
        px=SHEET_PX,
        sheet=None if sheet is None else base64.b64encode(sheet.jpeg).decode(),
    )
