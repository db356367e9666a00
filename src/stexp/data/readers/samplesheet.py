"""Sections of one's own, listed in a sample sheet."""

from __future__ import annotations

import zlib
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp import InputError
from stexp.data.section import Section, join
from stexp.data.slide import Slide

COLUMNS = ("section", "patient", "image", "counts", "spots", "um_per_px")
MAY_BE_EMPTY = ("image", "um_per_px")
POSITIONS = ("array_x", "array_y", "pixel_x", "pixel_y")
SEPARATORS = {".csv": ",", ".tsv": "\t", ".csv.gz": ",", ".tsv.gz": "\t"}
# spot ids may look like numbers ("007") or like missing values ("NA")
TEXT = {"dtype": str, "keep_default_na": False}


def read(sheet: str | Path) -> list[Section]:
    """Read the sections that a sample sheet lists, in its order.

    Parameters
    ----------
    sheet
        CSV (or TSV), one row per section; paths are relative to the sheet's folder. Columns, others are ignored:

        - ``section``: unique name; ``patient``: donor
        - ``image``: what `Slide` reads; empty for a section of which only the counts are at hand
        - ``counts``: raw counts, ``.h5ad`` (``X``) or ``.csv``/``.tsv`` (``.gz``); rows spots, columns genes
        - ``spots``: ``.csv``/``.tsv`` (``.gz``); spot id first, and the columns array_x, array_y, pixel_x, pixel_y;
          pixels are level-0 pixels of the image
        - ``um_per_px``: micrometres per level-0 pixel; may be empty

    Raises
    ------
    InputError
        A column, cell or file that is missing or does not fit; the message names the line of the sheet.
    """
    sheet = Path(sheet)
    if not sheet.is_file():
        raise InputError(f"sample sheet {sheet} does not exist; write one with the columns {', '.join(COLUMNS)}")
    rows = _table(sheet, "sample sheet", index_col=False, skip_blank_lines=False, **TEXT).fillna("")
    rows.columns = rows.columns.str.strip()
    missing = [name for name in COLUMNS if name not in rows.columns]
    if missing:
        raise InputError(f"sample sheet {sheet} lacks {', '.join(missing)}; it needs the columns {', '.join(COLUMNS)}")
    rows = rows[list(COLUMNS)].apply(lambda column: column.str.strip())
    rows = rows[(rows != "").any(axis=1)]
    if rows.empty:
        raise InputError(f"sample sheet {sheet} lists no section")
    twice = rows["section"][rows["section"].duplicated() & (rows["section"] != "")].unique()
    if len(twice):
        raise InputError(f"sample sheet {sheet} lists {', '.join(twice)} more than once; section names must be unique")
    sections = []
    for index, row in rows.iterrows():
        try:
            sections.append(_section(row, sheet.parent))
        except InputError as error:
            raise InputError(f"{sheet.name} line {index + 2}: {error}") from error
    return sections


def _section(row: pd.Series, folder: Path) -> Section:
    for column in COLUMNS:
        if not row[column] and column not in MAY_BE_EMPTY:
            raise InputError(f"column {column} is empty; only {' and '.join(MAY_BE_EMPTY)} may be")
    files = {column: folder / row[column] for column in ("image", "counts", "spots") if row[column]}
    for column, file in files.items():
        if not file.is_file():
            raise InputError(f"column {column}: {file} does not exist; paths are relative to {folder.absolute()}")
    counts, positions = read_counts(files["counts"]), read_positions(files["spots"])
    if not counts.obs_names.isin(positions.index).any() and counts.var_names.isin(positions.index).any():
        raise InputError(
            f"column counts: {files['counts']} has spots as columns; transpose it: rows spots, columns genes"
        )
    return Section(
        name=row["section"],
        patient=row["patient"],
        spots=join(counts, positions, f"section {row['section']}"),
        slide=Slide(files["image"]) if "image" in files else None,
        um_per_px=_um_per_px(row["um_per_px"]),
        files=tuple(files.values()),
    )


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


def read_counts(path: str | Path) -> ad.AnnData:
    """Raw counts, spots x genes, from ``.h5ad`` (``X``) or a table with the spot id first."""
    path = Path(path)
    if path.suffix == ".h5ad":
        return _h5ad_counts(path)
    table = _table(path, "counts", index_col=0, converters={0: str}, keep_default_na=False, na_values=[""])
    if table.shape[1] == 0:
        raise InputError(f"counts {path} has no gene column; rows spots, columns genes, the spot id first")
    # pandas makes numbers of ids such as 007, whatever it is told about an index
    table.index = pd.Index(_table(path, "counts", header=None, skiprows=1, usecols=[0], **TEXT).iloc[:, 0])
    # pandas renames the second column of a gene; Section shall see, and refuse, it
    genes = _table(path, "counts", header=None, nrows=1, **TEXT).iloc[0, -table.shape[1] :].str.strip()
    text = genes[[not pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]]
    if len(text):
        raise InputError(
            f"counts {path}: {len(text)} gene columns hold text (first: {text.iloc[0]}); counts are numbers"
        )
    return _counts(sp.csr_matrix(table.to_numpy(np.float32)), table.index, pd.Index(genes))


def _h5ad_counts(path: Path) -> ad.AnnData:
    try:
        found = ad.read_h5ad(path)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"counts {path} cannot be read as h5ad ({error})") from error
    if found.X is None:
        raise InputError(f"counts {path} has no X; raw counts belong there")
    return _counts(sp.csr_matrix(found.X, dtype=np.float32), found.obs_names, found.var_names)


def _counts(values: sp.csr_matrix, spots: pd.Index, genes: pd.Index) -> ad.AnnData:
    return ad.AnnData(values, obs=pd.DataFrame(index=spots.astype(str)), var=pd.DataFrame(index=genes.astype(str)))


def read_positions(path: str | Path) -> pd.DataFrame:
    """Index spot id; columns array_x, array_y, pixel_x, pixel_y, float64."""
    table = _table(Path(path), "spots", index_col=False, **TEXT)
    table = table.set_index(table.columns[0])
    missing = [name for name in POSITIONS if name not in table.columns]
    if missing:
        raise InputError(
            f"spots {path} lacks {', '.join(missing)}; it needs the spot id first, then {', '.join(POSITIONS)}"
        )
    table = table[list(POSITIONS)].apply(pd.to_numeric, errors="coerce")
    bad = table.index[table.isna().any(axis=1)]
    if len(bad):
        raise InputError(f"spots {path}: {len(bad)} rows hold a position that is not a number (first: {bad[0]})")
    return table.astype(np.float64)


def _table(path: Path, what: str, **options) -> pd.DataFrame:
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if ending not in SEPARATORS:
        fits = [*SEPARATORS, ".h5ad"] if what == "counts" else SEPARATORS
        raise InputError(f"{what} {path} ends in {ending or 'nothing'}; {', '.join(fits)} would fit")
    try:
        # utf-8-sig: spreadsheets put a byte-order mark in front
        return pd.read_csv(path, sep=SEPARATORS[ending], encoding="utf-8-sig", **options)
    except (ValueError, OSError, EOFError, zlib.error) as error:  # pandas' own errors and bad encodings are ValueErrors
        raise InputError(f"{what} {path} cannot be read as a table: {' '.join(str(error).split())}") from error
