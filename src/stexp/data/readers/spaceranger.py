"""Files of 10x pipelines: matrices of counts and tables of spot positions."""

from __future__ import annotations

import logging
import warnings
import zlib
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from stexp.errors import InputError

log = logging.getLogger(__name__)

POSITIONS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
"""Columns of SpaceRanger's table of positions; ``tissue_positions_list.csv`` has them in this order, unnamed."""

GENES = "Gene Expression"

MTX = (("matrix.mtx",), ("features.tsv", "genes.tsv"), ("barcodes.tsv",))
"""Files of a matrix folder, by what they may be called."""


def read_10x_counts(path: str | Path) -> ad.AnnData:
    """Counts as 10x pipelines write them.

    Parameters
    ----------
    path
        HDF5 file (version 2, one group named by the genome; version 3 and later, the group ``matrix``), or a
        folder with ``matrix.mtx``, ``features.tsv`` (or ``genes.tsv``) and ``barcodes.tsv``, each also as ``.gz``.

    Returns
    -------
    AnnData, n_spots x n_genes
        ``X`` CSR float32, rows named by barcode, columns by symbol (one symbol may occur twice), ids in
        ``var["gene_ids"]``. Features of another type than "Gene Expression" are left out, and counted in the log.

    Raises
    ------
    InputError
        Something is missing, damaged, or of another shape than features x barcodes.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"counts {path} do not exist")
    matrix, ids, symbols, types, barcodes = _read_mtx(path) if path.is_dir() else _read_h5(path)
    if matrix.shape != (len(barcodes), len(ids)):
        raise InputError(
            f"counts {path} hold {matrix.shape[1]} features x {matrix.shape[0]} barcodes, but "
            f"{len(ids)} features and {len(barcodes)} barcodes are named"
        )
    genes = np.array([kind == GENES for kind in types], dtype=bool)
    if not genes.all():
        if not genes.any():
            raise InputError(f"counts {path} have no feature of type {GENES}, only {', '.join(sorted(set(types)))}")
        log.info("counts %s: %d features are not %s and left out", path, int((~genes).sum()), GENES)
        matrix = matrix[:, genes]
    var = pd.DataFrame({"gene_ids": np.asarray(ids, dtype=object)[genes]}, index=np.asarray(symbols, object)[genes])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names that occur twice: whoever joins decides about them
        return ad.AnnData(matrix, obs=pd.DataFrame(index=np.asarray(barcodes, dtype=object)), var=var)


def _read_h5(path: Path) -> tuple[sp.csr_matrix, list[str], list[str], list[str], list[str]]:
    try:
        with h5py.File(path) as file:
            if "matrix" in file:
                group, features = file["matrix"], file["matrix/features"]
                ids, symbols, types = (_text(features[key]) for key in ("id", "name", "feature_type"))
            else:
                genomes = [name for name, item in file.items() if isinstance(item, h5py.Group) and "gene_names" in item]
                if len(genomes) != 1:
                    found = f"the genomes {', '.join(genomes)}" if genomes else f"{', '.join(file) or 'nothing'}"
                    raise InputError(f"counts {path} hold {found}; the group matrix, or one genome, would fit")
                group = file[genomes[0]]
                ids, symbols = _text(group["genes"]), _text(group["gene_names"])
                types = [GENES] * len(ids)
            n_features, n_barcodes = (int(n) for n in group["shape"][:])
            # compressed by barcode: CSC of features x barcodes is CSR of barcodes x features
            parts = group["data"][:].astype(np.float32), group["indices"][:], group["indptr"][:]
            matrix = sp.csr_matrix(parts, shape=(n_barcodes, n_features))
            matrix.check_format(full_check=True)  # indices beyond the shape would be read from foreign memory
            return matrix, ids, symbols, types, _text(group["barcodes"])
    except (OSError, KeyError, ValueError) as error:  # how h5py and scipy say that something is not there or broken
        raise InputError(f"counts {path} are no complete 10x HDF5 file: {' '.join(str(error).split())}") from error


def _text(dataset: h5py.Dataset) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in dataset[:]]


def _read_mtx(folder: Path) -> tuple[sp.csr_matrix, list[str], list[str], list[str], list[str]]:
    files = files_of_counts(folder)
    try:
        matrix = sp.csr_matrix(scipy.io.mmread(files[0]).T, dtype=np.float32)
        # a gene may be called NA
        features, barcodes = (
            pd.read_csv(file, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3) for file in files[1:]
        )
    except (ValueError, OSError, EOFError, OverflowError, zlib.error) as error:
        raise InputError(f"counts {folder} cannot be read: {' '.join(str(error).split())}") from error
    ids = features[0].tolist()
    symbols = features[1].tolist() if features.shape[1] > 1 else ids
    types = features[2].tolist() if features.shape[1] > 2 else [GENES] * len(ids)
    return matrix, ids, symbols, types, barcodes[0].tolist()


def files_of_counts(path: Path) -> list[Path]:
    """The files behind a matrix: itself, or what :func:`read_10x_counts` reads of a folder."""
    return [_one_of(path, *names) for names in MTX] if path.is_dir() else [path]


def _one_of(folder: Path, *names: str) -> Path:
    """The first of these files that is there, as it is or with ``.gz``."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise InputError(f"{folder} has no {' or '.join(names)} (nor with .gz)")


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
    if not path.is_file():
        raise InputError(f"positions {path} do not exist")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path).reset_index()
        else:
            table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            if table.shape[1] == len(POSITIONS) and _is_number(table.iloc[0, 1]):
                table.columns = list(POSITIONS)
            else:
                table = table.iloc[1:].set_axis(table.iloc[0].astype(str).str.strip(), axis=1)
    except (ValueError, OSError, EOFError, zlib.error) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise InputError(f"positions {path} cannot be read as a table: {' '.join(str(error).split())}") from error
    missing = [name for name in POSITIONS if name not in table.columns]
    if missing:
        raise InputError(
            f"positions {path} lack {', '.join(missing)}; {', '.join(POSITIONS)} would fit, or six columns in this "
            f"order without a header"
        )
    barcodes = pd.Index(table["barcode"].astype(str).to_numpy(dtype=object), name="barcode")
    values = table[list(POSITIONS[1:])].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    in_tissue, row, column, y, x = values.T
    bad = ~np.isfinite(values).all(axis=1) | ~np.isin(in_tissue, (0, 1))
    if bad.any():
        raise InputError(
            f"positions {path}: {int(bad.sum())} rows hold no number where one is needed, or in_tissue other than "
            f"0 and 1 (first: {barcodes[bad][0]})"
        )
    return pd.DataFrame(
        {"in_tissue": in_tissue == 1, "array_x": column, "array_y": row, "pixel_x": x, "pixel_y": y}, index=barcodes
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
