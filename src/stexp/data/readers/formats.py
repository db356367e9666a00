"""Counts and positions from the files that people have: matrices and tables of several makers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.join import split_ids
from stexp.data.readers.cells import read_cell_centres
from stexp.data.readers.count_tables import read_count_table
from stexp.data.readers.features import genes_of
from stexp.data.readers.h5ad import counts_of, read_h5ad
from stexp.data.readers.numbers import check_thousands, without_blanks
from stexp.data.readers.paths import user_path
from stexp.data.readers.spaceranger import (
    find_positions,
    flags,
    matrix_of,
    read_10x_counts,
    read_visium_positions,
    refuse_xenium,
)
from stexp.data.readers.text import ending_of, read_table
from stexp.errors import InputError

log = logging.getLogger(__name__)

POSITIONS = ("array_x", "array_y", "pixel_x", "pixel_y")
SELECTION = ("x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected")
"""Columns of the spot files of Spatial Transcriptomics; the second pair and the last column may be missing."""
# spot ids may look like numbers ("007") or like missing values ("NA")
TEXT = {"dtype": str, "keep_default_na": False}
_TABLES: ContextVar[list[tuple[str, int, int]] | None] = ContextVar("tables", default=None)
"""What `tables_in_one_line` counts: rows or columns, spots with a position, all spots."""


def read_counts(path: str | Path, spot_ids: pd.Index | None = None) -> ad.AnnData:
    """Raw counts, as one of several kinds of files holds them.

    Parameters
    ----------
    path
        ``.h5ad`` (``X`` must hold the raw counts), ``.h5`` of 10x, a folder of 10x (``matrix.mtx``, features,
        barcodes), or ``.csv``/``.tsv``, also ``.gz``: names in the first row and in the first column.
    spot_ids
        Ids of the spots that have a position. They decide whether the rows or the columns of a table are spots,
        which is said in the log. None: rows are spots.

    Returns
    -------
    AnnData, n_spots x n_genes
        ``X`` CSR float32; ``var["gene_ids"]`` where the file has it.

    Raises
    ------
    InputError
        Unreadable file, rows of different length, cells that are not numbers, and spot ids among both rows and
        columns, or among neither. Numbers that are not counts are left for `Section` to refuse.
    """
    path = matrix_of(user_path(path))
    ending = ending_of(path)
    if path.is_dir() or ending == ".h5":
        return read_10x_counts(path)
    if ending == ".h5ad":
        return counts_of(read_h5ad(path), f"counts {path}")
    rows, columns, values = read_count_table(path, also=(".h5ad", ".h5", "a folder with matrix.mtx"))
    if spot_ids is not None and _spots_are_columns(rows, columns, spot_ids, path):
        rows, columns, values = columns, rows, values.T.tocsr()
    return genes_of(values, rows, columns, where=f"counts {path}")


def _spots_are_columns(rows: pd.Index, columns: pd.Index, spot_ids: pd.Index, path: Path) -> bool:
    in_rows, in_columns = int(rows.isin(spot_ids).sum()), int(columns.isin(spot_ids).sum())
    if not in_rows and not in_columns:  # prefixes and suffixes may differ
        places = split_ids(spot_ids)[1]
        in_rows, in_columns = (int(split_ids(names)[1].isin(places).sum()) for names in (rows, columns))
    if bool(in_rows) == bool(in_columns):
        raise InputError(
            f"counts {path}: {in_rows} of {len(rows)} rows (first: {rows[0]}) and {in_columns} of {len(columns)} "
            f"columns (first: {columns[0]}) are named like one of the {len(spot_ids)} spots that have a position "
            f"(first: {spot_ids[0]}); either the rows or the columns must be spots"
        )
    spots, n, matched = ("rows", len(rows), in_rows) if in_rows else ("columns", len(columns), in_columns)
    tables = _TABLES.get()
    if tables is None:
        log.info("counts %s: spots are %s, %d of %d with a position", path, spots, matched, n)
    else:
        tables.append((spots, matched, n))
    return bool(in_columns)


@contextmanager
def tables_in_one_line(name: str) -> Iterator[None]:
    """Log once of all count tables read inside, instead of each, whether their spots are rows or columns.

    Parameters
    ----------
    name
        Of the data set.
    """
    tables: list[tuple[str, int, int]] = []
    token = _TABLES.set(tables)
    try:
        yield
    finally:
        _TABLES.reset(token)
    for spots in sorted({kind for kind, _, _ in tables}):
        matched, n = zip(*((matched, n) for kind, matched, n in tables if kind == spots), strict=True)
        log.info("%s: spots are %s in %s, %d of %d with a position", name, spots, _tables(len(n)), sum(matched), sum(n))


def _tables(n: int) -> str:
    return f"{n} count table" + ("s" if n != 1 else "")


# positions


def read_positions(path: str | Path) -> pd.DataFrame:
    """Where the spots on tissue are: `read_all_positions` without the others, which is logged.

    Returns
    -------
    DataFrame
        Index spot id; array_x, array_y, pixel_x, pixel_y, and new_x, new_y where the file has them; float64.
    """
    positions = read_all_positions(path)
    in_tissue = positions["in_tissue"].to_numpy()
    return positions.loc[in_tissue].drop(columns="in_tissue")


def read_all_positions(path: str | Path) -> pd.DataFrame:
    """Where the spots are, as one of three kinds of files says it.

    Parameters
    ----------
    path
        csv, tsv or txt, also ``.gz``, told apart by their columns:

        - the spot id first, then, in any order, array_x, array_y, pixel_x, pixel_y;
        - x, y, pixel_x, pixel_y, as in spot files of Spatial Transcriptomics; the id is ``"{x}x{y}"`` of the rounded
          coordinates unless another column comes first; ``selected`` 0 is not on tissue;
        - ``tissue_positions*`` of SpaceRanger, with or without a header, also ``.parquet``, or the folder ``spatial``.

        Or ``cell_segmentations.geojson`` of SpaceRanger 4: cells at the centres of their outlines, with whole pixels as
        array coordinates.

    Returns
    -------
    DataFrame
        Index spot id; array_x, array_y, pixel_x, pixel_y, and new_x, new_y where the file has them, float64;
        in_tissue, bool. ``attrs["array"]`` is ``"visium"`` for SpaceRanger's.

    Raises
    ------
    InputError
        A column that is missing, a position that is not a number, a flag other than 0 and 1, no spot on tissue.
    """
    path = user_path(path)
    path = find_positions(path) if path.is_dir() else path
    if ending_of(path) == ".geojson":
        centres = read_cell_centres(path)
        least = np.minimum(centres.min().to_numpy(), 0)
        centres[["array_x", "array_y"]] = np.floor(centres - least).to_numpy()
        return centres.assign(in_tissue=True)
    if ending_of(path) == ".parquet":
        return _of_visium(path)
    table = read_table(path, "spots", header=None, **TEXT).fillna("")
    table = table.apply(lambda column: column.str.strip())
    header = list(table.iloc[0])
    headless = table.shape[1] == 6 and pd.to_numeric(table.iloc[0, 1:], errors="coerce").notna().all()
    if headless or {"array_row", "array_col"} <= set(header):
        return _of_visium(path)
    return _of_columns(table.iloc[1:].set_axis(header, axis=1), path)


def _of_visium(path: Path) -> pd.DataFrame:
    positions = read_visium_positions(path).astype(dict.fromkeys(POSITIONS, np.float64))
    _say_left_out(positions["in_tissue"].to_numpy(), path)
    positions = positions[[*POSITIONS, "in_tissue"]]
    positions.attrs["array"] = "visium"
    return positions


def _of_columns(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Positions from a table of text with named columns."""
    header = list(table.columns)
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"spots {path} has more than one column {', '.join(twice)}")
    if table.empty:
        raise InputError(f"spots {path} has a header and no spot")
    is_selection = "x" in header and "array_x" not in header
    needed = ("x", "y", "pixel_x", "pixel_y") if is_selection else POSITIONS
    missing = [name for name in needed if name not in header]
    refuse_xenium(header, f"spots {path}")
    if missing:
        raise InputError(
            f"spots {path} lacks {', '.join(missing)}; it needs the spot id first, then {', '.join(POSITIONS)}; "
            f"x, y, pixel_x, pixel_y; or the columns of SpaceRanger's tissue_positions"
        )
    is_named = header[0] not in (SELECTION if is_selection else POSITIONS)
    if not is_named and not is_selection:
        raise InputError(f"spots {path} starts with the column {header[0]}; the spot id must come first")
    wanted = [name for name in (*needed, "new_x", "new_y") if name in header]
    # x, new_x lie on an array of fewer than 1000 places, and have three decimals as a rule
    check_thousands(table[[name for name in wanted if name in POSITIONS]], f"spots {path}")
    plain = without_blanks(table[wanted], f"spots {path}")
    numbers = plain.apply(pd.to_numeric, errors="coerce").astype(np.float64)
    ids = table[header[0]] if is_named else spot_ids(numbers["x"], numbers["y"])
    numbers.index = pd.Index(np.asarray(ids, dtype=object))
    bad = numbers[list(needed)].isna().any(axis=1).to_numpy()
    if bad.any():
        row = int(bad.argmax())
        column = next(name for name in needed if np.isnan(numbers[name].iloc[row]))
        raise InputError(
            f"spots {path}: {int(bad.sum())} rows hold a position that is not a number (first: spot "
            f"{numbers.index[row]}, {column} {str(table[column].iloc[row])[:50]!r})"
        )
    if is_selection:
        numbers[["x", "y"]] = numbers[["x", "y"]].round()
        numbers = numbers.rename(columns={"x": "array_x", "y": "array_y"})
    flag = next((name for name in ("selected", "in_tissue") if name in header), None)
    return numbers.assign(in_tissue=True if flag is None else _flagged(table[flag], numbers.index, path))


def _flagged(column: pd.Series, ids: pd.Index, path: Path) -> np.ndarray:
    values = flags(column).to_numpy()
    bad = np.isnan(values)
    if bad.any():
        raise InputError(
            f"spots {path}: {column.name} of {int(bad.sum())} spots is neither 0 nor 1 (first: spot "
            f"{ids[bad][0]}, {str(column.iloc[int(bad.argmax())])[:50]!r})"
        )
    _say_left_out(values == 1, path)
    return values == 1


def _say_left_out(in_tissue: np.ndarray, path: Path) -> None:
    if not in_tissue.any():
        raise InputError(f"spots {path}: none of {len(in_tissue)} spots is selected, or in tissue")
    if not in_tissue.all():
        log.info("spots %s: %d of %d are not on tissue and left out", path, int((~in_tissue).sum()), len(in_tissue))


def spot_ids(x: pd.Series, y: pd.Series) -> pd.Index:
    """``"{x}x{y}"``, how Spatial Transcriptomics names spots; "nan" stands where a coordinate is missing."""
    whole = [pd.to_numeric(values, errors="coerce").round() for values in (x, y)]
    return pd.Index([f"{a:.0f}x{b:.0f}" for a, b in zip(*whole, strict=True)], dtype=object)


def um_per_px(positions: pd.DataFrame, step_um: float, where: str | Path) -> float | None:
    """Micrometres per pixel: the distance of neighbouring array coordinates over the fitted one.

    Parameters
    ----------
    positions
        new_x, new_y (coordinates corrected for spots printed slightly off their places), pixel_x, pixel_y.
    step_um
        Distance on the array of two spots whose x differ by 1.

    Returns
    -------
    float or None
        Mean over x and y, which differ by up to 1.1 % in HER2+. None where the spots lie in one row or column.

    Raises
    ------
    InputError
        Pixel positions fall where array coordinates rise.
    """
    pitch = []
    for corrected, pixel in (("new_x", "pixel_x"), ("new_y", "pixel_y")):
        table = positions[[corrected, pixel]].apply(pd.to_numeric, errors="coerce").dropna()
        if table[corrected].nunique() < 2:
            return None
        pitch.append(np.polyfit(table[corrected], table[pixel], 1)[0])
    if min(pitch) <= 0:
        raise InputError(f"{where}: pixel positions fall where array coordinates rise; was the image turned?")
    return step_um / float(np.mean(pitch))
