"""``slide=sheet.csv``: slides to predict, with the scale of each."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pandas as pd

from stexp.data.readers.formats import read_table
from stexp.data.slides.formats import slide_name
from stexp.errors import InputError, did_you_mean

COLUMNS = ("slide", "um_per_px")


def read_slide_sheet(path: Path) -> dict[str, tuple[Path, float | None]]:
    """Read a table with the columns ``slide`` and, if need be, ``um_per_px``, a slide a row.

    Returns
    -------
    dict
        Name of a slide -> its file, a relative path from the folder of the sheet; and micrometres per level-0 pixel,
        None where the cell is empty: what the file says, or what ``um_per_px=`` says of all.

    Raises
    ------
    InputError
        No such table, another column, a file that is not there, a scale that is none, or two slides of one name.
    """
    table = read_table(path, "slide sheet", dtype=str, keep_default_na=False)
    table.columns = [str(column).strip() for column in table.columns]
    for column in table.columns:
        if column not in COLUMNS:
            near = did_you_mean(column, COLUMNS)
            raise InputError(f"slide sheet {path} has a column {column!r}; slide and um_per_px would fit{near}")
    if "slide" not in table or not len(table):
        raise InputError(f"slide sheet {path} names no slide; a column slide, and a row a slide, would fit")
    slides: dict[str, tuple[Path, float | None]] = {}
    for number, row in enumerate(table.to_dict("records"), start=2):
        where = f"slide sheet {path}, line {number}"
        image = path.parent / os.path.expanduser(str(row["slide"]).strip())
        if not image.is_file():
            raise InputError(f"{where}: there is no image {image}")
        name = slide_name(image)
        if name in slides:
            raise InputError(f"{where}: {slides[name][0]} and {image} have one name; predict them into two output_dir")
        slides[name] = image, _um_per_px(row.get("um_per_px", ""), where)
    return slides


def _um_per_px(cell: object, where: str) -> float | None:
    text = "" if pd.isna(cell) else str(cell).strip()
    if not text:
        return None
    try:
        um = float(text)
    except ValueError:
        um = math.nan
    if not 0 < um < math.inf:
        raise InputError(f"{where}: um_per_px is {text!r}; a number above 0 (0.5 for 20x, 0.25 for 40x) would fit")
    return um
