"""Sections of one's own, listed in a sample sheet."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from stexp.data.gene_names import harmonise
from stexp.data.join import join
from stexp.data.kept_sections import read_each
from stexp.data.readers.formats import TEXT, read_all_positions, read_counts
from stexp.data.readers.paths import user_path
from stexp.data.readers.spaceranger import files_of_counts, find_positions
from stexp.data.readers.text import read_table
from stexp.data.readers.visium_scale import bin_size_um, fit_um_per_px
from stexp.data.section import Section
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


def read_samplesheet(sheet: str | Path, gene_table: str | Path | None = None) -> list[Section]:
    """Read the sections that a sample sheet lists, in its order.

    Parameters
    ----------
    sheet
        CSV (or TSV), or a folder with ``sheet.csv`` in it; one row per section. Paths are relative to the sheet's
        folder. Columns, in any order:

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
    sheet = _sheet_file(user_path(sheet))
    rows = _rows(sheet)

    def read(line: tuple[int, pd.Series]) -> Section:
        try:
            return _section(line[1], sheet.parent, gene_table)
        except InputError as error:
            raise InputError(f"{sheet.name} line {line[0] + 1}: {error}") from error

    sections = read_each(rows.iterrows(), len(rows), f"reading {sheet.name}: sections", read)
    _say_shared_counts(sections, [sheet.parent / user_path(name) for name in rows["counts"]])
    return sections


def _sheet_file(sheet: Path) -> Path:
    """The sheet itself, where a user points at it, at its folder, or at it as ``data.root``."""
    if sheet.is_file():
        return sheet
    if sheet.parent.is_file():  # data.root=my.csv, and so data.sheet=my.csv/sheet.csv
        return sheet.parent
    folder = sheet if sheet.is_dir() else sheet.parent
    if sheet.is_dir() and (sheet / "sheet.csv").is_file():
        return sheet / "sheet.csv"
    tables = sorted(path.name for path in folder.glob("*.[ct]sv") if not path.name.startswith("."))
    near = f"; in {folder} there are {', '.join(tables[:5])} (data.sheet=)" if tables else ""
    raise InputError(f"sample sheet {sheet} does not exist; write one with the columns {', '.join(COLUMNS)}{near}")


def _say_shared_counts(sections: list[Section], files: list[Path]) -> None:
    """Warn of sections that took the same spots of one file: as a rule one of them should have had others."""
    of_file: dict[Path, list[Section]] = {}
    for section, file in zip(sections, files, strict=True):
        of_file.setdefault(file, []).append(section)
    for file, sharing in of_file.items():
        for one, other in combinations(sharing, 2):
            n = int(one.spots.obs_names.isin(other.spots.obs_names).sum())
            if n:
                log.warning(
                    "sections %s and %s have the counts of the same %d spots of %s", one.name, other.name, n, file
                )


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
    files = {column: folder / user_path(row[column]) for column in ("image", "counts", "spots") if row[column]}
    for column, file in files.items():
        if not (file.is_file() or (file.is_dir() and column != "image")):
            raise InputError(f"column {column}: {file} does not exist; paths are relative to {folder.absolute()}")
    with _column("spots"):
        spots_file = find_positions(files["spots"]) if files["spots"].is_dir() else files["spots"]
        positions = read_all_positions(spots_file)
    with _column("counts"):
        counts = harmonise(read_counts(files["counts"], positions.index), gene_table, where)
    with _column("image"):
        slide = Slide(files["image"]) if "image" in files else None
        if slide is not None:
            slide.size  # noqa: B018  opens it, so that a damaged image is refused here
    spots = join(counts, positions, where)
    um_per_px = _um_per_px(row["um_per_px"])
    fitted = _scale_of_array(positions, spots_file, where)
    if fitted is not None and um_per_px is None and (slide is None or slide.um_per_px is None):
        um_per_px = fitted
        log.warning("%s: um_per_px is empty; %.4g follows from the array of the positions", where, fitted)
    elif fitted is not None and um_per_px is not None and not 1 / 1.1 < fitted / um_per_px < 1.1:
        log.warning(
            "%s: um_per_px %.4g was given, the array of the positions says %.4g; the given one counts",
            where,
            um_per_px,
            fitted,
        )
    spots.uns["metadata"] = {name: row[name] for name in row.index if name not in COLUMNS}
    read_from = [*([files["image"]] if slide else []), *files_of_counts(files["counts"]), spots_file]
    return Section(
        name=row["section"],
        patient=row["patient"],
        spots=spots,
        slide=slide,
        um_per_px=um_per_px,
        files=tuple(read_from),
    )


def _scale_of_array(positions: pd.DataFrame, path: Path, where: str) -> float | None:
    """Micrometres per pixel by the array of SpaceRanger's positions; None for other positions, and for too few."""
    if positions.attrs.get("array") != "visium":
        return None
    bin_um = bin_size_um(positions, {}, path.absolute().parent.parent, where)
    try:
        return fit_um_per_px(positions, {}, bin_um, where)
    except InputError as error:
        log.info("%s; the scale is not fitted", error)
        return None


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
