"""Counts and positions from the files that people have: matrices and tables of several makers."""

from __future__ import annotations

import csv
import gzip
import io
import logging
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.data.readers.spaceranger import read_10x_counts, read_visium_positions
from stexp.data.section import check_counts
from stexp.errors import InputError

log = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t", ".csv.gz": ",", ".tsv.gz": "\t"}
POSITIONS = ("array_x", "array_y", "pixel_x", "pixel_y")
SELECTION = ("x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected")
"""Columns of the spot files of Spatial Transcriptomics; the second pair and the last column may be missing."""
# spot ids may look like numbers ("007") or like missing values ("NA")
TEXT = {"dtype": str, "keep_default_na": False}
BLOCK = 1 << 25  # bytes of text parsed at a time; the parser needs ten times as much


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
    path = Path(path)
    if path.is_dir() or path.suffix == ".h5":
        return read_10x_counts(path)
    if path.suffix == ".h5ad":
        return _h5ad_counts(path)
    separator = _separator(path, "counts", also=(".h5ad", ".h5", "a folder with matrix.mtx"))
    rows, columns, values = _read_matrix(path, separator)
    if spot_ids is not None and _spots_are_columns(rows, columns, spot_ids, path):
        rows, columns, values = columns, rows, values.T.tocsr()
    return _counts(values, rows, columns)


def _spots_are_columns(rows: pd.Index, columns: pd.Index, spot_ids: pd.Index, path: Path) -> bool:
    in_rows, in_columns = int(rows.isin(spot_ids).sum()), int(columns.isin(spot_ids).sum())
    if bool(in_rows) == bool(in_columns):
        raise InputError(
            f"counts {path}: {in_rows} of {len(rows)} rows (first: {rows[0]}) and {in_columns} of {len(columns)} "
            f"columns (first: {columns[0]}) are named like one of the {len(spot_ids)} spots that have a position "
            f"(first: {spot_ids[0]}); either the rows or the columns must be spots"
        )
    log.info(
        "counts %s: spots are %s, %d x %d; %d of them have a position",
        path,
        "rows" if in_rows else "columns",
        len(rows),
        len(columns),
        in_rows or in_columns,
    )
    return bool(in_columns)


def _h5ad_counts(path: Path) -> ad.AnnData:
    try:
        found = ad.read_h5ad(path)
        values = None if found.X is None else checked_csr(found.X)
    except Exception as error:  # damaged files make h5py and anndata raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"counts {path} cannot be read as h5ad ({reason})") from error
    if values is None:
        raise InputError(f"counts {path} has no X; raw counts belong there")
    elsewhere = [f"layers[{name!r}]" for name in found.layers if name is not None and "count" in name.lower()]
    elsewhere += ["raw.X"] if found.raw is not None else []
    if elsewhere:
        try:
            check_counts(values.data, f"counts {path}")
        except InputError as error:
            raise InputError(f"{error} in X; if {' or '.join(elsewhere)} holds them, save it as X") from None
    counts = _counts(values, found.obs_names, found.var_names)
    if "gene_ids" in found.var:
        counts.var["gene_ids"] = found.var["gene_ids"].astype(object).to_numpy()
    return counts


def checked_csr(values: np.ndarray | sp.spmatrix) -> sp.csr_matrix:
    """Counts of a file as CSR float32; ValueError where its indices point outside, which scipy would follow."""
    if sp.issparse(values):
        values.check_format(full_check=True)
    return sp.csr_matrix(values, dtype=np.float32)


def _counts(values: sp.csr_matrix, spots: pd.Index, genes: pd.Index) -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names that occur twice: `Section` refuses them
        return ad.AnnData(values, obs=pd.DataFrame(index=spots.astype(str)), var=pd.DataFrame(index=genes.astype(str)))


def _separator(path: Path, what: str, also: tuple[str, ...] = ()) -> str:
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if ending not in SEPARATORS:
        fits = ", ".join([*SEPARATORS, *also])
        raise InputError(f"{what} {path} ends in {ending or 'nothing'}; {fits} would fit")
    return SEPARATORS[ending]


# matrices as text


def _read_matrix(path: Path, separator: str) -> tuple[pd.Index, pd.Index, sp.csr_matrix]:
    """Names of rows and columns, and the counts, of a table.

    A section has up to thirty million cells, most of them "0". Array operations on the text read all 36 of HER2+ in
    six seconds, pandas takes seven times as long; whatever is not digits and separators goes to pandas.
    """
    try:
        text = path.read_bytes()
        text = gzip.decompress(text) if text[:2] == b"\x1f\x8b" else text
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"counts {path} cannot be read ({error}); fetch the file again") from None
    header, _, body = text.removeprefix(b"\xef\xbb\xbf").partition(b"\n")  # spreadsheets put that mark in front
    try:
        names = next(csv.reader([header.decode().rstrip("\r")], delimiter=separator), [])
        first = next(csv.reader([body[: body.find(b"\n") + 1 or None].decode()], delimiter=separator), [])
    except (UnicodeDecodeError, csv.Error):
        raise InputError(f"counts {path} are not text; need a table of counts, plain or gzip") from None
    # write.table of R leaves out the name above the row names
    columns = names if names and names[0] and len(first) == len(names) + 1 else names[1:]
    if not columns or not body.strip():
        raise InputError(f"counts {path} are empty; need names in the first row and column, and counts")
    parts = []
    for block in _blocks(body):
        part = _parse_digits(block, len(columns), separator)
        if part is None:
            parts = [_parse_slowly(body, len(columns), path, separator)]
            break
        parts.append(part)
    rows = [name for ids, _ in parts for name in ids]
    values = parts[0][1] if len(parts) == 1 else sp.vstack([counts for _, counts in parts], format="csr")
    return pd.Index(rows, dtype=object), pd.Index([name.strip() for name in columns], dtype=object), values


def _blocks(body: bytes) -> Iterator[bytes]:
    """The text in pieces that end where a line ends."""
    start = 0
    while start < len(body):
        end = body.find(b"\n", start + BLOCK) + 1 or len(body)
        yield body[start:end]
        start = end


def _parse_digits(body: bytes, n_columns: int, separator: str = "\t") -> tuple[list[str], sp.csr_matrix] | None:
    """Row names and counts, or None where the text is anything but rows of a name and `n_columns` whole numbers."""
    if not body.endswith(b"\n"):
        body += b"\n"
    text = np.frombuffer(body, dtype=np.uint8)
    ends = np.flatnonzero((text == ord(separator)) | (text == 10))  # where each cell ends; 10 is the newline
    if ends.size % (n_columns + 1):
        return None
    ends = ends.reshape(-1, n_columns + 1)
    n_rows = len(ends)
    # every row ends in the only newline of its row
    if np.count_nonzero(text == 10) != n_rows or not (text[ends[:, -1]] == 10).all():
        return None
    starts = np.concatenate([[0], ends[:-1, -1] + 1])
    ids = [body[start:end] for start, end in zip(starts, ends[:, 0], strict=True)]
    digit = text - np.uint8(ord("0"))  # wraps round, so that only digits come out as 0..9
    names = b"".join(ids)
    not_digits = ends.size + sum(not 48 <= byte <= 57 for byte in names)
    lengths = np.diff(ends, axis=1) - 1
    if np.count_nonzero(digit > 9) != not_digits or not names.isascii() or b'"' in names:
        return None
    if lengths.min() < 1 or lengths.max() > 7:  # up to seven digits float32 is exact
        return None
    cells = np.flatnonzero((digit[ends[:, 1:] - 1] != 0) | (lengths > 1))
    last, length = ends[:, 1:].ravel()[cells] - 1, lengths.ravel()[cells]
    values = digit[last].astype(np.float32)
    for place in range(1, int(length.max(initial=1))):
        longer = np.flatnonzero(length > place)
        values[longer] += np.float32(10**place) * digit[last[longer] - place]
    row, column = np.divmod(cells, n_columns)
    indptr = np.searchsorted(row, np.arange(n_rows + 1))
    counts = sp.csr_matrix((values, column.astype(np.int32), indptr.astype(np.int32)), shape=(n_rows, n_columns))
    counts.eliminate_zeros()  # "00"
    return [name.decode() for name in ids], counts


def _parse_slowly(body: bytes, n_columns: int, path: Path, separator: str = "\t") -> tuple[list[str], sp.csr_matrix]:
    # missing counts are missing, but a row may be called NA, or 007
    missing = {column: ["", "NA", "NaN", "nan"] for column in range(1, n_columns + 1)}
    options = {"dtype": {0: object}, "na_values": missing, "keep_default_na": False}
    try:
        table = pd.read_csv(io.BytesIO(body), sep=separator, header=None, **options)
    except ValueError as error:  # pandas' own errors are
        raise InputError(
            f"counts {path} are not a table of numbers: {' '.join(str(error).split())}, not counting the header"
        ) from None
    names, cells = list(table[0]), table.iloc[:, 1:]
    if cells.shape[1] != n_columns:
        raise InputError(f"counts {path}: {n_columns} names in the header, {cells.shape[1]} counts in a row")
    text = [i for i, kind in enumerate(cells.dtypes) if not pd.api.types.is_numeric_dtype(kind)]
    if text:
        column = cells.iloc[:, text[0]]
        row = int(pd.to_numeric(column, errors="coerce").isna().to_numpy().argmax())
        raise InputError(
            f"counts {path} are not a table of numbers: {len(text)} columns hold text "
            f"(first: {str(column.iloc[row])[:50]!r} in the row {names[row]}, column {text[0] + 2})"
        )
    return names, sp.csr_matrix(cells.to_numpy(np.float32))


# positions


def read_positions(path: str | Path) -> pd.DataFrame:
    """Where the spots are, as one of three kinds of files says it.

    Parameters
    ----------
    path
        csv or tsv, also ``.gz``, told apart by their columns:

        - the spot id first, then, in any order, array_x, array_y, pixel_x, pixel_y;
        - x, y, pixel_x, pixel_y, as in spot files of Spatial Transcriptomics; the id is ``"{x}x{y}"`` of the rounded
          coordinates unless another column comes first; rows with ``selected`` 0 are left out, which is logged;
        - ``tissue_positions*`` of SpaceRanger, with or without a header, also ``.parquet``; rows with ``in_tissue`` 0
          are left out, which is logged.

    Returns
    -------
    DataFrame
        Index spot id; array_x, array_y, pixel_x, pixel_y, and new_x, new_y where the file has them; float64.

    Raises
    ------
    InputError
        A column that is missing, or a position that is not a number.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return _visium_positions(path)
    table = read_table(path, "spots", header=None, **TEXT).fillna("")
    table = table.apply(lambda column: column.str.strip())
    header = list(table.iloc[0])
    headless = table.shape[1] == 6 and pd.to_numeric(table.iloc[0, 1:], errors="coerce").notna().all()
    if headless or {"array_row", "array_col"} <= set(header):
        return _visium_positions(path)
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"spots {path} has more than one column {', '.join(twice)}")
    table = table.iloc[1:].set_axis(header, axis=1)
    if table.empty:
        raise InputError(f"spots {path} has a header and no spot")
    is_selection = "x" in header and "array_x" not in header
    needed = ("x", "y", "pixel_x", "pixel_y") if is_selection else POSITIONS
    missing = [name for name in needed if name not in header]
    if missing:
        raise InputError(
            f"spots {path} lacks {', '.join(missing)}; it needs the spot id first, then {', '.join(POSITIONS)}; "
            f"x, y, pixel_x, pixel_y; or the columns of SpaceRanger's tissue_positions"
        )
    wanted = [name for name in (*needed, "new_x", "new_y") if name in header]
    numbers = table[wanted].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    bad = numbers[list(needed)].isna().any(axis=1).to_numpy()
    named = header[0] not in (SELECTION if is_selection else POSITIONS)
    if not named and not is_selection:
        raise InputError(f"spots {path} starts with the column {header[0]}; the spot id must come first")
    ids = table[header[0]] if named else spot_ids(numbers["x"], numbers["y"])
    numbers.index = pd.Index(np.asarray(ids, dtype=object))
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
        if "selected" in header:
            numbers = _left_in(numbers, pd.to_numeric(table["selected"], errors="coerce").to_numpy() != 0, path)
    return numbers


def _visium_positions(path: Path) -> pd.DataFrame:
    positions = read_visium_positions(path)
    return _left_in(positions[list(POSITIONS)].astype(np.float64), positions["in_tissue"].to_numpy(bool), path)


def _left_in(positions: pd.DataFrame, keep: np.ndarray, path: Path) -> pd.DataFrame:
    if not keep.any():
        raise InputError(f"spots {path}: none of {len(keep)} spots is selected, or in tissue")
    if not keep.all():
        log.info("spots %s: %d of %d are not on tissue and left out", path, int((~keep).sum()), len(keep))
    return positions[keep]


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


def read_table(path: Path, what: str, **options) -> pd.DataFrame:
    """A csv or tsv, also ``.gz``; `options` go to ``pandas.read_csv``, `what` names the file in messages."""
    separator = _separator(path, what)
    try:
        # utf-8-sig: spreadsheets put a byte-order mark in front
        return pd.read_csv(path, sep=separator, encoding="utf-8-sig", **options)
    except (ValueError, OSError, EOFError, zlib.error) as error:  # pandas' own errors and bad encodings are ValueErrors
        raise InputError(f"{what} {path} cannot be read as a table: {' '.join(str(error).split())}") from error
