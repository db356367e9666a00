"""Files of 10x pipelines: matrices of counts and tables of spot positions."""

from __future__ import annotations

import io
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import scipy.io
import scipy.sparse as sp

from stexp.data.hdf5 import open_hdf5
from stexp.data.readers.features import genes_of
from stexp.data.readers.memory import check_fits, one_line_without_memory
from stexp.data.readers.numbers import check_thousands, decimal_points, without_blanks
from stexp.data.readers.text import find_separator, read_text
from stexp.errors import InputError
from stexp.files import is_number

log = logging.getLogger(__name__)

POSITIONS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
"""Columns of SpaceRanger's table of positions; ``tissue_positions_list.csv`` has them in this order, unnamed."""

BYTES_PER_ENTRY = 40
"""Memory per entry while a matrix.mtx is read: row, column and value twice."""

MTX = (("matrix.mtx",), ("features.tsv", "genes.tsv"), ("barcodes.tsv",))
"""Files of a matrix folder, by what they may be called."""


def read_10x_counts(path: str | Path) -> ad.AnnData:
    """Counts as 10x pipelines write them.

    Parameters
    ----------
    path
        HDF5 file (version 2, one group named by the genome; version 3 and later, the group ``matrix``), or a
        folder with ``matrix.mtx``, ``features.tsv`` (or ``genes.tsv``) and ``barcodes.tsv``, each also as ``.gz`` and
        after a prefix; that ``matrix.mtx``; or an ``outs`` with either in it.

    Returns
    -------
    AnnData, n_spots x n_genes
        ``X`` CSR float32, rows named by barcode, columns by symbol (one symbol may occur twice), ids in
        ``var["gene_ids"]``. Features that are no genes are left out, and counted in the log; see `genes_of`.

    Raises
    ------
    InputError
        Something is missing, damaged, of another shape than features x barcodes, in another file, or larger than
        memory allows.
    """
    path = matrix_of(Path(path))
    if not path.exists():
        raise InputError(f"counts {path} do not exist")
    with one_line_without_memory(f"counts {path}"):
        matrix = read_mtx(path) if path.is_dir() else _read_h5(path)
        return genes_of(
            matrix.values, matrix.barcodes, matrix.symbols, matrix.ids, matrix.types, matrix.genomes, f"counts {path}"
        )


@dataclass(frozen=True)
class Matrix:
    """Counts as a file has them, before genes are told from other features."""

    values: sp.csr_matrix  # barcodes x features
    barcodes: list[str]
    ids: list[str]
    symbols: list[str]
    types: list[str] | None = None
    genomes: list[str] | None = None


def check_shape(path: Path, shape: tuple[int, int], n_barcodes: int, n_features: int) -> None:
    """InputError unless a matrix, barcodes x features, has as many of both as are named."""
    if shape != (n_barcodes, n_features):
        raise InputError(
            f"counts {path} hold {shape[1]} features x {shape[0]} barcodes, but {n_features} features and "
            f"{n_barcodes} barcodes are named"
        )


def _read_h5(path: Path) -> Matrix:
    with open_h5(path) as (group, features):
        barcodes = _text(group["barcodes"])
        n_features, n_barcodes = (int(n) for n in group["shape"][:])
        check_shape(path, (n_barcodes, n_features), len(barcodes), len(features.ids))
        # compressed by barcode: CSC of features x barcodes is CSR of barcodes x features
        parts = group["data"][:].astype(np.float32), group["indices"][:], group["indptr"][:]
        values = sp.csr_matrix(parts, shape=(n_barcodes, n_features))
        values.check_format(full_check=True)  # indices beyond the shape would be read from foreign memory
        return Matrix(values, barcodes, **vars(features))


@dataclass(frozen=True)
class Features:
    """Features of a matrix of 10x, in its order; types and genomes are None where the file has none."""

    ids: list[str]
    symbols: list[str]
    types: list[str] | None = None
    genomes: list[str] | None = None


def read_10x_features(path: Path) -> Features:
    """Features of a matrix in HDF5, without its counts; InputError where it is none."""
    with open_h5(path, ("matrix/features",)) as (_, features):
        return features


@contextmanager
def open_h5(path: Path, names: Sequence[str] = ("/",)) -> Iterator[tuple[h5py.Group, Features]]:
    """The group of a matrix in HDF5, and its features; whatever lacks or breaks while it is open is one line.

    Parameters
    ----------
    names
        What will be read, and must fit into memory; see :func:`~stexp.data.hdf5.open_hdf5`.
    """
    try:
        with open_hdf5(path, "counts", names) as file:
            group, is_old = _matrix_group(path, file)
            features = group if is_old else group["features"]
            yield (
                group,
                Features(
                    ids=_text(features["genes" if is_old else "id"]),
                    symbols=_text(features["gene_names" if is_old else "name"]),
                    types=None if is_old else _text(features["feature_type"]),
                    genomes=_text(features["genome"]) if not is_old and "genome" in features else None,
                ),
            )
    except InputError:
        raise
    except (OSError, KeyError, ValueError) as error:  # how h5py and scipy say that something is not there or broken
        raise InputError(f"counts {path} are no complete 10x HDF5 file: {' '.join(str(error).split())}") from error


def _matrix_group(path: Path, file: h5py.File) -> tuple[h5py.Group, bool]:
    """The group of the matrix, and whether it is that of a genome, as in version 2."""
    if "matrix" in file:
        return file["matrix"], False
    genomes = [name for name, item in list(file.items()) if isinstance(item, h5py.Group) and "gene_names" in item]
    if len(genomes) == 1:
        return file[genomes[0]], True
    if genomes:
        raise InputError(
            f"counts {path} hold {len(genomes)} genomes ({', '.join(genomes)}); a matrix of one of them would fit"
        )
    raise InputError(f"counts {path} hold {', '.join(file) or 'nothing'}; the group matrix, or one genome, would fit")


def _text(dataset: h5py.Dataset) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in dataset[:]]


def read_mtx(folder: Path) -> Matrix:
    """What ``matrix.mtx``, ``features.tsv`` and ``barcodes.tsv`` of a folder hold."""
    files = files_of_counts(folder)
    features, barcodes = (_read_names(file) for file in files[1:])
    ids = features[0].tolist()
    symbols = features[1].tolist() if features.shape[1] > 1 else ids
    types = features[2].tolist() if features.shape[1] > 2 else None
    names = barcodes[0].tolist()
    try:
        rows, columns, n_entries = _announced(files[0])
        check_shape(folder, (columns, rows), len(names), len(ids))
        check_fits(BYTES_PER_ENTRY * n_entries, f"counts {files[0]}")
        values = sp.csr_matrix(scipy.io.mmread(files[0]).T, dtype=np.float32)
    except InputError:
        raise
    except (ValueError, OSError, EOFError, OverflowError, zlib.error) as error:
        raise InputError(f"counts {folder} cannot be read: {' '.join(str(error).split())}") from error
    return Matrix(values, names, ids, symbols, types)


def _announced(path: Path) -> tuple[int, int, int]:
    """Rows, columns and entries that the head of a ``matrix.mtx`` announces."""
    rows, columns, entries, *_ = scipy.io.mminfo(path)
    # an entry has at least two bytes, and gzip packs no more than 1032 into one
    most = path.stat().st_size * (1032 if path.suffix == ".gz" else 1) // 2
    if entries > most:
        raise InputError(f"counts {path} announce {entries} entries, more than its size can hold; is it damaged?")
    return rows, columns, entries


def _read_names(path: Path) -> pd.DataFrame:
    """The columns of ``features.tsv`` or ``barcodes.tsv``, all text; a gene may be called NA."""
    content = read_text(path, "counts")
    try:
        return pd.read_csv(io.BytesIO(content), sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
    except ValueError as error:
        raise InputError(f"counts {path} cannot be read: {' '.join(str(error).split())}") from error


def find_counts(folder: Path) -> Path:
    """The matrix of a folder: filtered before raw (only spots in tissue are used of either), HDF5 before mtx."""
    for kind in ("filtered", "raw"):
        # files as 10x offers them for download start with the name of the data set
        files = sorted(path for path in folder.glob(f"*{kind}_feature_bc_matrix.h5") if not path.name.startswith("."))
        if len(files) > 1:
            raise InputError(f"{folder} has {len(files)} matrices: {', '.join(path.name for path in files)}; keep one")
        files += [path for path in sorted(folder.glob(f"*{kind}_feature_bc_matrix")) if path.is_dir()]
        if files:
            return files[0]
    raise InputError(f"{folder} has no filtered_feature_bc_matrix.h5, nor a folder filtered_feature_bc_matrix")


def find_positions(spatial: Path) -> Path:
    names = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
    for name in names:
        if (spatial / name).is_file():
            return spatial / name
    raise InputError(f"{spatial} has none of {', '.join(names)}")


def matrix_of(path: Path) -> Path:
    """The matrix that a user means by a file or folder: itself, or that of ``outs``, or of ``matrix.mtx``."""
    if path.name.removesuffix(".gz").endswith("matrix.mtx") and path.is_file():
        return path.parent
    if path.is_dir() and not _named(path, *MTX[0]):
        for folder in (path, path / "outs"):
            if any(folder.glob("*_feature_bc_matrix*")):
                return find_counts(folder)
    return path


def files_of_counts(path: Path) -> list[Path]:
    """The files behind a matrix: itself, or what :func:`read_10x_counts` reads of a folder."""
    path = matrix_of(path)
    return [_one_of(path, *names) for names in MTX] if path.is_dir() else [path]


def _one_of(folder: Path, *names: str) -> Path:
    """The only file of a folder that is called so, as it is or with ``.gz``, alone or after a prefix."""
    files = _named(folder, *names)
    if not files:
        raise InputError(f"{folder} has no {' or '.join(names)} (nor with .gz)")
    if len(files) > 1:
        raise InputError(f"{folder} has {len(files)} matrices ({', '.join(file.name for file in files)}); keep one")
    return files[0]


def _named(folder: Path, *names: str) -> list[Path]:
    """Files called by the first of the names that occurs; GEO sets a prefix before each."""
    for name in names:
        for pattern in (name, f"{name}.gz", f"*[_.-]{name}", f"*[_.-]{name}.gz"):
            files = sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))
            if files:
                return files
    return []


def read_visium_positions(path: str | Path) -> pd.DataFrame:
    """SpaceRanger's table of spot positions.

    Parameters
    ----------
    path
        ``tissue_positions_list.csv`` (SpaceRanger 1, no header), ``tissue_positions.csv`` (2 and later, with one)
        or ``tissue_positions.parquet`` (HD). Whether there is a header is read from the file, not from its name.

    Returns
    -------
    DataFrame
        Index barcode; columns in_tissue (bool), array_x (``array_col``), array_y (``array_row``), pixel_x
        (``pxl_col_in_fullres``), pixel_y (``pxl_row_in_fullres``): the file names rows, which are y, first.

    Raises
    ------
    InputError
        Missing file, missing column, or a value that is not a number.
    """
    path = Path(path)
    table = _read_positions_table(path)
    missing = [name for name in POSITIONS if name not in table.columns]
    refuse_xenium(table.columns, f"positions {path}")
    if missing:
        raise InputError(
            f"positions {path} lack {', '.join(missing)}; {', '.join(POSITIONS)} would fit, or six columns in this "
            f"order without a header"
        )
    barcodes = pd.Index(table["barcode"].astype(str).str.strip().to_numpy(dtype=object), name="barcode")
    table = table.assign(in_tissue=flags(table["in_tissue"]))
    values = table[list(POSITIONS[1:])].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    in_tissue, row, column, y, x = values.T
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise InputError(
            f"positions {path}: {int(bad.sum())} rows hold no number where one is needed, or in_tissue other than "
            f"0 and 1 (first: {barcodes[bad][0]})"
        )
    return pd.DataFrame(
        {"in_tissue": in_tissue == 1, "array_x": column, "array_y": row, "pixel_x": x, "pixel_y": y}, index=barcodes
    )


def _read_positions_table(path: Path) -> pd.DataFrame:
    """The table as it is in the file, text or numbers, with the names of its columns."""
    if not path.is_file():
        raise InputError(f"positions {path} do not exist")
    try:
        if path.suffix.lower() == ".parquet":
            check_parquet(path)
            table = pd.read_parquet(path).reset_index()
        else:
            content, separator = find_separator(read_text(path, "positions"), path, "positions", expected=",")
            table = pd.read_csv(io.BytesIO(content), sep=separator, header=None, dtype=str, keep_default_na=False)
            table = without_blanks(decimal_points(table, f"positions {path}"), f"positions {path}")
            if table.shape[1] == len(POSITIONS) and is_number(table.iloc[0, 1]):
                table.columns = list(POSITIONS)
            else:
                table = table.iloc[1:].set_axis(table.iloc[0].astype(str).str.strip(), axis=1)
            check_thousands(table.iloc[:, 1:], f"positions {path}")
    except InputError:
        raise
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise InputError(f"positions {path} cannot be read as a table: {' '.join(str(error).split())}") from error
    return table


def refuse_xenium(columns: Iterable[object], subject: str) -> None:
    """InputError for the columns of a table of Xenium's cells, which lie in micrometres beside any image."""
    if {"x_centroid", "y_centroid"} <= set(columns):
        raise InputError(
            f"{subject} are cells of Xenium in micrometres, of which only the matrix of the H&E image makes pixels; "
            f"data=xenium data.spots=cells reads both"
        )


def flags(column: pd.Series) -> pd.Series:
    """1 for 1 and true, 0 for 0 and false (in any case), NaN for whatever else stands in a column of flags."""
    text = column.astype(str).str.strip().str.lower()
    numbers = pd.to_numeric(text, errors="coerce")
    return text.map({"true": 1.0, "false": 0.0}).fillna(numbers.where(numbers.isin((0, 1))))


def check_parquet(path: Path) -> None:
    """Raise InputError where what a parquet file announces does not fit into memory; ValueError where it is none."""
    metadata = pq.read_metadata(path)
    n_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    check_fits(3 * max(n_bytes, metadata.num_rows * metadata.num_columns), f"positions {path}")
