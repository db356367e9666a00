"""Predicted expression from the files that other tools write: h5ad, and tables in wide or long form."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.readers.h5ad import IDS, read_h5ad
from stexp.data.readers.memory import check_fits, one_line_without_memory
from stexp.data.readers.paths import user_path
from stexp.data.readers.text import SEPARATORS, ending_of
from stexp.errors import InputError, did_you_mean
from stexp.evaluation.foreign.layout import FITS, DataNames, dense, lay_out, locate, refuse_transposed
from stexp.evaluation.foreign.tables import read_table_of_predictions


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files that paths and glob patterns name, each once; InputError where one names none."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = user_path(pattern)
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path)))]
        if not matches:
            raise InputError(f"predictions={pattern}: there is no such file; give {FITS}")
        folder = next((match for match in matches if match.is_dir()), None)
        if folder is not None:
            raise InputError(f"predictions={pattern}: {folder} is a folder; name files, as in '{folder}/*.h5ad'")
        files |= dict.fromkeys(matches)
    return list(files)


MEASURED = ("counts", "observed")
"""Layers of a ``predictions.h5ad`` of ours that hold no predictions."""


def read_predictions(files: Sequence[Path], names: DataNames, layer: str | None = None) -> ad.AnnData:
    """Predicted expression of several files as one.

    Parameters
    ----------
    files
        See :data:`~stexp.evaluation.foreign.layout.FITS`. A file without a section column may be called by its section.
    names
        Of the data set that the predictions are of.
    layer
        Of h5ad files; None: ``X``.

    Returns
    -------
    AnnData, spots x genes
        ``X`` float32, NaN where a file does not have the gene; ``obs`` section and spot; ``var["gene_ids"]`` where
        files have ids; ``uns["stexp"]`` of a single file that has it.

    Raises
    ------
    InputError
        A file is missing, damaged or of another kind; or nothing says the section or spot of its rows.
    """
    parts = [_read_file(path, names, layer) for path in files]
    if len(parts) == 1:
        return parts[0]
    genes = pd.Index(list(dict.fromkeys(gene for part in parts for gene in part.var_names)), dtype=object)
    n = sum(part.n_obs for part in parts)
    check_fits(4 * n * len(genes), f"{len(files)} files of predictions")
    values, row = np.full((n, len(genes)), np.nan, dtype=np.float32), 0
    ids: dict[str, str] = {}
    for part in parts:
        values[row : row + part.n_obs, genes.get_indexer(part.var_names)] = part.X
        row += part.n_obs
        if "gene_ids" in part.var:
            ids |= {gene: gene_id for gene, gene_id in part.var["gene_ids"].items() if gene_id}
    var = pd.DataFrame({"gene_ids": [ids.get(gene, "") for gene in genes]} if ids else None, index=genes)
    return lay_out(values, pd.concat([part.obs for part in parts]), var, "predictions")


def _read_file(path: Path, names: DataNames, layer: str | None) -> ad.AnnData:
    ending = ending_of(path)
    is_table = ending == ".parquet" or ending.removesuffix(".gz") in SEPARATORS
    if ending != ".h5ad" and not is_table:
        raise InputError(f"predictions {path} ends in {ending or 'nothing'}; give {FITS}")
    if path.stat().st_size == 0:
        raise InputError(f"predictions {path} is empty; give {FITS}")
    if layer is not None and is_table:
        raise InputError(f"layer={layer}: {path} is no h5ad; only those have layers")
    with one_line_without_memory(f"predictions {path}"):
        return read_table_of_predictions(path, names) if is_table else _read_h5ad(path, names, layer)


def _read_h5ad(path: Path, names: DataNames, layer: str | None) -> ad.AnnData:
    return predictions_of(read_h5ad(path, "predictions"), names, f"predictions {path}", layer, path.stem)


def predictions_of(
    adata: ad.AnnData, names: DataNames, where: str, layer: str | None = None, stem: str | None = None
) -> ad.AnnData:
    """Predicted expression of an AnnData, of a file or in memory, laid out as `read_predictions` does.

    Parameters
    ----------
    where
        What it is, for messages.
    layer
        That holds the predictions; None: ``X``.
    stem
        Name of its file, which may hold that of a section.

    Returns
    -------
    AnnData, spots x genes
        With ``uns["stexp"]`` where that is said of these very predictions: not of another layer, nor of an ``X`` that
        was changed.

    Raises
    ------
    InputError
        No such layer, no numbers, or nothing that says section or spot; genes x spots; or what was measured instead of
        what was predicted.
    """
    layers = ", ".join(str(key) for key in adata.layers if key is not None) or "none"
    if layer is not None and layer not in adata.layers:
        raise InputError(f"layer={layer}: {where} has the layers {layers}{did_you_mean(layer, adata.layers)}")
    if layer is None and adata.X is None:
        raise InputError(f"{where} has no X; layer= names what holds the predictions (layers: {layers})")
    if 0 in adata.shape:
        raise InputError(f"{where} has {adata.n_obs} spots and {adata.n_vars} genes; one of each at least would fit")
    refuse_transposed(adata.obs_names, adata.var_names, names, where)
    values = dense(adata.X if layer is None else adata.layers[layer], where)
    ids = next((adata.var[column] for column in adata.var if str(column).lower() in IDS), None)
    var = pd.DataFrame(index=pd.Index(adata.var_names.astype(str), dtype=object))
    if ids is not None:
        var["gene_ids"] = ids.astype(object).where(ids.notna(), "").astype(str).to_numpy()
    out = lay_out(values, locate(adata.obs, adata.obs_names, where, names.sections, stem), var, where)
    if not isinstance(adata.uns.get("stexp"), Mapping) or "predicted" not in adata.layers:
        return out
    is_predicted = layer not in MEASURED and _same(values, adata.layers["predicted"], where)
    measured = [key for key in MEASURED if key in adata.layers and _same(values, adata.layers[key], where)]
    if measured and not is_predicted:
        what = "X" if layer is None else f"layer={layer}"
        raise InputError(f"{what} of {where} is what was measured ({measured[0]}); the layer predicted would fit")
    if is_predicted:
        out.uns["stexp"], out.layers["predicted"] = adata.uns["stexp"], out.X
    return out


def _same(values: np.ndarray, layer: Any, where: str) -> bool:
    return np.array_equal(values, dense(layer, where), equal_nan=True)
