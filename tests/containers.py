"""One matrix of features written into every kind of file that counts come in."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

GENE, ANTIBODY, HASH = "Gene Expression", "Antibody Capture", "Multiplexing Capture"


@dataclass(frozen=True)
class Matrix:
    """Counts of features of several types; `ids` with their version, as references of 10x and others have them."""

    values: np.ndarray  # spots x features
    spots: list[str]
    ids: list[str]
    names: list[str]
    types: list[str]
    genomes: list[str]


def write_h5(path: Path, matrix: Matrix) -> None:
    counts = sp.csr_matrix(matrix.values)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(matrix.spots, dtype="S")
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices, counts.indptr
        group["shape"] = np.array(counts.shape[::-1])
        for key, values in (
            ("id", matrix.ids),
            ("name", matrix.names),
            ("feature_type", matrix.types),
            ("genome", matrix.genomes),
        ):
            group[f"features/{key}"] = np.array(values, dtype="S")


def write_mtx(path: Path, matrix: Matrix) -> None:
    path.mkdir()
    scipy.io.mmwrite(path / "matrix.mtx", sp.coo_matrix(matrix.values.T), field="integer")
    lines = ["\t".join(feature) for feature in zip(matrix.ids, matrix.names, matrix.types, strict=True)]
    (path / "features.tsv.gz").write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    (path / "barcodes.tsv").write_text("".join(f"{spot}\n" for spot in matrix.spots))


def var_of(matrix: Matrix) -> pd.DataFrame:
    """As scanpy's read_10x_h5 leaves it."""
    columns = {"gene_ids": matrix.ids, "feature_types": matrix.types, "genome": matrix.genomes}
    return pd.DataFrame(columns, index=pd.Index(matrix.names, dtype=object))


def write_h5ad(path: Path, matrix: Matrix, var: pd.DataFrame | None = None) -> None:
    ad.AnnData(
        sp.csr_matrix(matrix.values.astype(np.float32)),
        obs=pd.DataFrame(index=matrix.spots),
        var=var_of(matrix) if var is None else var,
    ).write_h5ad(path)


def write_h5ad_by_id(path: Path, matrix: Matrix) -> None:
    """As CELLxGENE has it: names are ids, symbols a column."""
    columns = {"feature_name": matrix.names, "feature_types": pd.Categorical(matrix.types)}
    write_h5ad(path, matrix, pd.DataFrame(columns, index=matrix.ids))


def write_table(path: Path, matrix: Matrix, by: str = "names", turned: bool = False) -> None:
    """A table of the genes alone: text has no column for types."""
    genes = [kind == GENE for kind in matrix.types]
    columns = [name for name, keep in zip(getattr(matrix, by), genes, strict=True) if keep]
    table = pd.DataFrame(matrix.values[:, genes], index=matrix.spots, columns=columns)
    (table.T if turned else table).to_csv(path, sep="\t" if ".tsv" in path.name else ",")
