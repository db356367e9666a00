"""``predictions.h5ad``: observed and predicted expression of the held-out spots, for people and for scoring."""

from __future__ import annotations

import json
import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from stexp import InputError
from stexp.data.section import Section
from stexp.metrics import top_genes
from stexp.protocol import Protocol


def make_predictions(
    spots: pd.DataFrame,
    panel: list[str],
    *,
    observed: np.ndarray,
    predicted: np.ndarray,
    counts: np.ndarray,
    xy_px: np.ndarray,
    mean_train: np.ndarray,
    uncertainty: np.ndarray | None = None,
    obs: pd.DataFrame | None = None,
    embedding: np.ndarray | None = None,
) -> ad.AnnData:
    """Lay out predictions of Q spots and G genes.

    Parameters
    ----------
    spots
        Q rows: section, patient, spot, array_x, array_y, total_counts, index ``section:spot``.
    observed, predicted, counts, uncertainty : (Q, G)
        Observed expression and counts are NaN in columns of genes not measured in a section.
    xy_px : (Q, 2)
    mean_train : (G,)
        Mean expression of the training spots on the scale of `observed`.
    obs
        Q rows with what the method says of each prediction.
    embedding : (Q, D)
        Of the tiles.
    """
    columns = spots[["section", "patient", "spot", "array_x", "array_y", "total_counts"]].copy()
    if obs is not None:
        columns = pd.concat([columns, obs.set_index(columns.index)], axis=1)
    var = pd.DataFrame({"mean_train": mean_train.astype(np.float32)}, index=pd.Index(panel, name="gene"))
    for name, mean in (("heg50_train", mean_train), ("heg50_test", _mean_measured(observed))):
        var[name] = False
        var.iloc[top_genes(mean), var.columns.get_loc(name)] = True
    adata = ad.AnnData(predicted.astype(np.float32), obs=columns, var=var)
    adata.layers["observed"] = observed.astype(np.float32)
    adata.layers["predicted"] = predicted.astype(np.float32)
    if uncertainty is None:
        uncertainty = np.full(predicted.shape, np.nan)
    adata.layers["uncertainty"] = uncertainty.astype(np.float32)
    adata.layers["counts"] = counts.astype(np.float32)
    adata.obsm["spatial"] = xy_px
    if embedding is not None:
        adata.obsm["image_embedding"] = embedding.astype(np.float32)
    return adata


def add_images(adata: ad.AnnData, sections: list[Section], spot_um: float = 100.0, max_px: int = 1600) -> None:
    """Put thumbnails where scanpy's and squidpy's spatial plots look for them.

    A spot is drawn with `spot_um` where the scale is known, else with half the distance of its neighbours.
    """
    images = {}
    for section in sections:
        if section.slide is None:
            continue
        thumbnail, scale = section.slide.thumbnail(max_px)
        spacing = _spacing(section.xy_px)
        diameter = min(spot_um / section.um_per_px, spacing) if section.um_per_px else spacing / 2
        images[section.name] = {
            "images": {"hires": thumbnail},
            "scalefactors": {"tissue_hires_scalef": scale, "spot_diameter_fullres": diameter},
        }
    adata.uns["spatial"] = images


def write(adata: ad.AnnData, path: Path) -> None:
    """Write an h5ad so that half a file is never taken for a whole one."""
    part = path.with_name(f".{path.name}.part")
    adata.write_h5ad(part, compression="gzip")
    os.replace(part, path)


def read(path: Path) -> ad.AnnData:
    """Read an h5ad of a run folder."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: the run has not got that far; start it again to finish it")
    try:
        return ad.read_h5ad(path)
    except (OSError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def protocol_of(adata: ad.AnnData) -> Protocol:
    """The protocol that predictions were made under, from its fields."""
    try:
        return Protocol(**json.loads(adata.uns["stexp"]["protocol"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"these predictions do not say their protocol ({error}); they are not whole") from None


def _mean_measured(values: np.ndarray) -> np.ndarray:
    """Mean over the spots where a gene was measured; NaN where it never was."""
    measured = ~np.isnan(values)
    return np.where(measured.any(0), np.nansum(values, axis=0) / np.maximum(measured.sum(0), 1), np.nan)


def _spacing(xy: np.ndarray) -> float:
    from scipy.spatial import cKDTree

    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])) if len(xy) > 1 else 100.0
