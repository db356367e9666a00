"""Counts summed over groups of barcodes, or of transcripts, without what is summed in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import scipy.sparse as sp

from stexp.data.readers.features import genes_of
from stexp.data.readers.memory import one_line_without_memory
from stexp.data.readers.spaceranger import Features, check_shape, open_h5, read_mtx

ENTRIES_AT_ONCE = 1 << 24
"""Entries of a matrix that are summed at a time."""
NAMES = ("matrix/features", "matrix/barcodes", "matrix/indptr")
"""What is read whole of a matrix that is summed."""


def read_10x_sums(path: Path, group_of: Callable[[np.ndarray], np.ndarray], names: Sequence[str]) -> ad.AnnData:
    """Counts as 10x pipelines write them, summed over groups of barcodes, block by block.

    Parameters
    ----------
    path
        HDF5 file, or a folder with ``matrix.mtx``; see :func:`read_10x_counts`.
    group_of
        From barcodes (N,), bytes, to the number of each one's group; -1 leaves it out.
    names
        Of the groups.

    Returns
    -------
    AnnData, n_groups x n_genes
        As :func:`read_10x_counts` returns it. Memory grows with the sums, not with the matrix.
    """
    with one_line_without_memory(f"counts {path}"):
        if path.is_dir():
            matrix = read_mtx(path)
            groups = group_of(np.array(matrix.barcodes, dtype="S"))
            entries = matrix.values.tocoo()
            sums = sums_of([(groups[entries.row], entries.col, entries.data)], (len(names), len(matrix.ids)))
            features = Features(matrix.ids, matrix.symbols, matrix.types, matrix.genomes)
        else:
            with open_h5(path, NAMES) as (group, features):
                groups = group_of(np.asarray(group["barcodes"][:], dtype="S"))
                n_features, n_barcodes = (int(n) for n in group["shape"][:])
                check_shape(path, (n_barcodes, n_features), len(groups), len(features.ids))
                sums = sums_of(_blocks(group, groups), (len(names), n_features))
        return genes_of(
            sums, names, features.symbols, features.ids, features.types, features.genomes, where=f"counts {path}"
        )


def _blocks(group: h5py.Group, groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Entries of a matrix by barcode, some millions at a time: group, feature and count of each."""
    ends = group["indptr"][:]
    if len(ends) != len(groups) + 1 or (np.diff(ends) < 0).any():
        raise ValueError("indptr does not fit its barcodes")
    first = 0
    while first < len(groups):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + ENTRIES_AT_ONCE, side="right")) - 1)
        part = slice(int(ends[first]), int(ends[last]))
        rows = np.repeat(groups[first:last], np.diff(ends[first : last + 1]))
        yield rows, group["indices"][part], group["data"][part]
        first = last


def sums_of(blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], shape: tuple[int, int]) -> sp.csr_matrix:
    """Sums of counts by group and feature; entries of group -1 are left out."""
    total = sp.csr_matrix(shape, dtype=np.float64)
    for rows, columns, values in blocks:
        own = rows >= 0
        # out of CSR come float64 sums, exact for whole numbers, in the order of the features
        total = total + sp.coo_matrix((values[own].astype(np.float64), (rows[own], columns[own])), shape).tocsr()
    return total.astype(np.float32)
