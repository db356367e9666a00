"""``predictions.h5ad``: observed and predicted expression of the held-out spots; and reading files of a run folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.section import Section
from stexp.errors import InputError
from stexp.evaluation.metrics import top_genes
from stexp.protocol import Protocol

AGAIN = "give the command that made the run again"
"""What makes a missing file of a run folder: the command goes on from what is there."""


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
        pitch = spacing(section.xy_px)
        diameter = min(spot_um / section.um_per_px, pitch) if section.um_per_px else pitch / 2
        factors = {"tissue_hires_scalef": scale, "spot_diameter_fullres": diameter}
        if section.um_per_px:
            factors["microns_per_pixel"] = section.um_per_px  # as SpaceRanger calls it
        images[section.name] = {"images": {"hires": thumbnail}, "scalefactors": factors}
    adata.uns["spatial"] = images


def add_neighbours(adata: ad.AnnData, spots: pd.DataFrame, rows: np.ndarray, weights: np.ndarray) -> None:
    """Name the references that count most for each of Q predictions.

    Puts into `adata`: ``obsm["neighbours"]`` (Q, n) rows of ``uns["references"]``, a table with section, patient and
    (where known) spot, and ``obsm["neighbour_weights"]`` (Q, n).

    Parameters
    ----------
    spots
        Columns section, patient, and perhaps spot; its index names them.
    rows, weights : (Q, n)
        Rows of `spots`, by falling weight.
    """
    used, among = np.unique(rows, return_inverse=True)
    columns = [name for name in ("section", "patient", "spot") if name in spots]
    adata.uns["references"] = spots[columns].iloc[used].astype(str)
    adata.obsm["neighbours"] = among.reshape(rows.shape).astype(np.int32)
    adata.obsm["neighbour_weights"] = np.asarray(weights, dtype=np.float32)


def heaviest_references(adata: ad.AnnData) -> list[str]:
    """Names of the references, by falling sum of their weights."""
    names = adata.uns["references"].index
    total = np.bincount(adata.obsm["neighbours"].ravel(), adata.obsm["neighbour_weights"].ravel(), len(names))
    return list(names[np.argsort(-total, kind="stable")])


def write(adata: ad.AnnData, path: Path) -> None:
    """Write an h5ad so that half a file is never taken for a whole one."""
    part = path.with_name(f".{path.name}.part")
    adata.write_h5ad(part, compression="gzip")
    os.replace(part, path)


def read(path: Path, *needs: str) -> ad.AnnData:
    """Read an h5ad of a run folder.

    Parameters
    ----------
    needs
        What it must hold, as ``layers/counts`` or ``uns/stexp/fold``.

    Raises
    ------
    InputError
        The file is missing or damaged, or lacks something.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: the run has not got that far; {AGAIN}")
    try:
        adata = ad.read_h5ad(path)
    except Exception as error:  # h5py and anndata raise errors of every kind at damaged bytes
        raise _damaged(path, error) from error
    absent = [need for need in needs if not _holds(adata, need)]
    if absent:
        raise InputError(f"{path} has no {', '.join(absent)}; delete it and {AGAIN}")
    return adata


def read_json(path: Path, *needs: str) -> dict:
    """Read a JSON object of a run folder; InputError where it is missing or damaged, or lacks a key of `needs`."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: the run has not got that far; {AGAIN}")
    try:
        # NaN is not JSON, but Python writes it; both mean "no value"
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object; delete it and {AGAIN}")
    absent = [key for key in needs if key not in content]
    if absent:
        raise InputError(f"{path} has no {', '.join(absent)}; delete it and {AGAIN}")
    return content


def protocol_of(adata: ad.AnnData) -> Protocol:
    """The protocol that predictions were made under, from its fields."""
    try:
        return Protocol(**json.loads(adata.uns["stexp"]["protocol"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"these predictions do not say their protocol ({error}); they are not whole") from None


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{path} cannot be read: {reason}; delete it and {AGAIN}")


def _holds(adata: ad.AnnData, need: str) -> bool:
    attribute, *keys = need.split("/")
    held = getattr(adata, attribute)
    for key in keys:
        if key not in held:
            return False
        held = held[key]
    return True


def _mean_measured(values: np.ndarray) -> np.ndarray:
    """Mean over the spots where a gene was measured; NaN where it never was."""
    measured = ~np.isnan(values)
    return np.where(measured.any(0), np.nansum(values, axis=0) / np.maximum(measured.sum(0), 1), np.nan)


def spacing(xy: np.ndarray) -> float:
    """Median distance of spots (N, 2) to their nearest neighbour; 100 for a single spot."""
    from scipy.spatial import cKDTree

    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])) if len(xy) > 1 else 100.0
