"""Counts of an AnnData: of a file, or in memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.data.hdf5 import open_hdf5
from stexp.data.readers.features import genes_of
from stexp.data.readers.memory import one_line_without_memory
from stexp.data.section import check_counts
from stexp.errors import InputError

IDS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensemblid", "ensembl")
SYMBOLS = ("gene_symbols", "gene_symbol", "gene_names", "gene_name", "feature_name", "symbols", "symbol")
TYPES = ("feature_types", "feature_type")
GENOMES = ("genome", "genomes")
"""Columns of ``var``, in any case, by what scanpy and others call them."""


def read_h5ad(path: Path, subject: str = "counts") -> ad.AnnData:
    """An h5ad whose content lies in the file; InputError where it does not, is damaged, or is too large."""
    with one_line_without_memory(f"{subject} {path}"):
        try:
            with open_hdf5(path, subject):
                pass
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # formats and names of older versions
                return ad.read_h5ad(path)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # damaged files make h5py and anndata raise anything
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{subject} {path} cannot be read as h5ad ({reason})") from error


def counts_of(adata: ad.AnnData, where: str) -> ad.AnnData:
    """Raw counts of the genes of an AnnData, as `read_10x_counts` gives them.

    Parameters
    ----------
    adata
        ``X`` holds the raw counts. Of ``var``, columns of ids, symbols, feature types and genomes are understood as
        scanpy and CELLxGENE call them: features of another type are left out, symbols are the names.
    where
        What it is, for messages.

    Returns
    -------
    AnnData, n_spots x n_genes
        ``X`` CSR float32; ``var["gene_ids"]`` where there are ids.

    Raises
    ------
    InputError
        No ``X``, or no raw counts in it while a layer or ``raw`` may hold them; no gene among the features.
    """
    if adata.X is None:
        raise InputError(f"{where} has no X; raw counts belong there")
    try:
        values = checked_csr(adata.X)
    except ValueError as error:
        raise InputError(f"{where} cannot be read as h5ad ({' '.join(str(error).split())[:200]})") from error
    elsewhere = [f"layers[{name!r}]" for name in adata.layers if name is not None and "count" in name.lower()]
    elsewhere += ["raw.X"] if adata.raw is not None else []
    if elsewhere:
        try:
            check_counts(values.data, where)
        except InputError as error:
            raise InputError(f"{error} in X; if {' or '.join(elsewhere)} holds them, save it as X") from None
    names = adata.var_names.astype(str).to_numpy(dtype=object)
    symbols, ids = _column(adata.var, SYMBOLS), _column(adata.var, IDS)
    if symbols is not None:
        # CELLxGENE and scanpy's var_names="gene_ids": the names are ids
        ids = names if ids is None else ids
        names = np.where(symbols == "", names, symbols)
    return genes_of(
        values,
        adata.obs_names.astype(str).to_numpy(dtype=object),
        names,
        ids,
        _column(adata.var, TYPES),
        _column(adata.var, GENOMES),
        where,
    )


def _column(var: pd.DataFrame, names: tuple[str, ...]) -> np.ndarray | None:
    """The first of these columns as text, "" where it is missing; None where there is none."""
    by_name = {str(column).lower(): column for column in var.columns[::-1]}
    for name in names:
        if name in by_name:
            column = var[by_name[name]].astype(object)
            return column.where(column.notna(), "").astype(str).to_numpy(dtype=object)
    return None


def checked_csr(values: np.ndarray | sp.spmatrix) -> sp.csr_matrix:
    """Counts of a file as CSR float32; ValueError where its indices point outside, which scipy would follow."""
    if not isinstance(values, np.ndarray) and sp.issparse(values):
        values.check_format(full_check=True)
    return sp.csr_matrix(values, dtype=np.float32)
