"""Sections of one's own, listed in a sample sheet."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from stexp.data.gene_names import harmonise
from stexp.data.readers.formats import TEXT, read_counts, read_positions, read_table
from stexp.data.readers.spaceranger import files_of_counts
from stexp.data.section import Section, join
from stexp.data.slides.slide import Slide
from stexp.errors import InputError

log = logging.getLogger(__name__)

NEEDED = ("section", "patient", "counts", "spots")
OPTIONAL = ("image", "um_per_px")
_MEANT = {
    "image": ("images", "img", "imgs", "slide", "wsi", "picture", "he", "h&e"),
    "um_per_px": ("um_per_pixel", "mpp", "um", "umperpx", "um/px", "microns_per_pixel", "pixel_size", "pixel_size_um"),
}
COLUMNS = ("section", "patient", "image", "counts", "spots", "um_per_px")


def read(sheet: str | Path, gene_table: str | Path | None = None) -> list[Section]:
    """Read the sections that a sample sheet lists, in its order.

    Parameters
    ----------
    sheet
        CSV (or TSV), one row per section; paths are relative to the sheet's folder. Columns, in any order:

        - ``section``: unique name; ``patient``: donor
        - ``counts``: raw counts, a file or folder that `stexp.data.readers.formats.read_counts` reads
        - ``spots``: positions, a file that `stexp.data.readers.formats.read_positions` reads; pixels are level-0
          pixels of the image
        - ``image``: what `Slide` reads; empty for a section of which only the counts are at hand
        - ``um_per_px``: micrometres per level-0 pixel; empty where nobody knows, or the image says it

        ``image`` and ``um_per_px`` may be left out, which is logged. Every further column is kept as text in
        ``spots.uns["metadata"]``, a dict.
    gene_table
        See `stexp.data.gene_names.harmonise`.

    Raises
    ------
    InputError
        A column, cell or file that is missing or does not fit; the message names the line of the sheet, and the
        column.
    """
    sheet = Path(sheet)
    if not sheet.is_file():
        raise InputError(f"sample sheet {sheet} does not exist; write one with the columns {', '.join(COLUMNS)}")
    rows = _rows(sheet)
    sections = []
    for index, row in rows.iterrows():
        try:
            sections.append(_section(row, sheet.parent, gene_table))
        except InputError as error:
            raise InputError(f"{sheet.name} line {index + 1}: {error}") from error
    return sections


def _rows(sheet: Path) -> pd.DataFrame:
    """The cells of the sheet as text, each row indexed by its line, counted from 0; absent columns are empty."""
    rows = read_table(sheet, "sample sheet", header=None, skip_blank_lines=False, **TEXT).fillna("")
    rows = rows.apply(lambda column: column.str.strip())
    header = list(rows.iloc[0])
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise InputError(f"sample sheet {sheet} has more than one column {', '.join(twice)}")
    missing = [name for name in NEEDED if name not in header]
    if missing:
        raise InputError(
            f"sample sheet {sheet} lacks {', '.join(missing)}; it needs the columns {', '.join(COLUMNS)}, "
            f"and has {', '.join(header)[:200]}"
        )
    absent = [name for name in OPTIONAL if name not in header]
    for name in absent:
        near = [other for other in header if other not in COLUMNS and other.lower() in _MEANT[name]]
        if near:
            raise InputError(f"sample sheet {sheet} has a column {near[0]}, but none called {name}; rename it")
    if absent:
        log.warning("sample sheet %s has no column %s; none of its sections has one", sheet, ", ".join(absent))
    rows = rows.iloc[1:].set_axis(header, axis=1)
    nameless = rows[""].to_numpy().ravel() if "" in header else np.array([])
    if (nameless != "").any():
        raise InputError(f"sample sheet {sheet} has cells in a column without a name (first: {max(nameless)!r})")
    rows = rows[[name for name in header if name]]
    rows = rows[(rows != "").any(axis=1)]
    if rows.empty:
        raise InputError(f"sample sheet {sheet} lists no section")
    twice = rows["section"][rows["section"].duplicated() & (rows["section"] != "")].unique()
    if len(twice):
        raise InputError(f"sample sheet {sheet} lists {', '.join(twice)} more than once; section names must be unique")
    return rows.assign(**dict.fromkeys(absent, ""))


def _section(row: pd.Series, folder: Path, gene_table: str | Path | None) -> Section:
    for column in NEEDED:
        if not row[column]:
            raise InputError(f"column {column} is empty; only {' and '.join(OPTIONAL)} may be")
    where = f"section {row['section']}"
    files = {column: folder / row[column] for column in ("image", "counts", "spots") if row[column]}
    for column, file in files.items():
        if not (file.is_file() or (file.is_dir() and column == "counts")):
            raise InputError(f"column {column}: {file} does not exist; paths are relative to {folder.absolute()}")
    with _column("spots"):
        positions = read_positions(files["spots"])
    with _column("counts"):
        counts = harmonise(read_counts(files["counts"], positions.index), gene_table, where)
    with _column("image"):
        slide = Slide(files["image"]) if "image" in files else None
        if slide is not None:
            slide.size  # noqa: B018  opens it, so that a damaged image is refused here
    spots = join(counts, positions, where)
    spots.uns["metadata"] = {name: row[name] for name in row.index if name not in COLUMNS}
    read_from = [*([files["image"]] if slide else []), *files_of_counts(files["counts"]), files["spots"]]
    return Section(
        name=row["section"],
        patient=row["patient"],
        spots=spots,
        slide=slide,
        um_per_px=_um_per_px(row["um_per_px"]),
        files=tuple(read_from),
    )


@contextmanager
def _column(name: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"column {name}: {error}") from error


def _um_per_px(cell: str) -> float | None:
    if not cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = np.nan
    if not 0 < value < np.inf:
        raise InputError(
            f"column um_per_px: {cell!r} is not a size; a number above 0 (say 0.5) or an empty cell would fit"
        )
    return value
