"""Spots that touch, and genes that vary in space."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import cKDTree
from scipy.stats import false_discovery_control, norm

from stexp.data.slides.spacing import spacing

TOUCHING = 1.3  # spacings: neighbours on a hexagonal or square grid, diagonals left out


def adjacency(adata: ad.AnnData) -> sp.csr_matrix:
    """Spots that touch: within 1.3 of the spacing in the same section; (N, N), 0 and 1, symmetric."""
    return touching(np.asarray(adata.obsm["spatial"], dtype=np.float64), adata.obs["section"].to_numpy(str))


def touching(xy: np.ndarray, section: np.ndarray) -> sp.csr_matrix:
    """`adjacency` of spots at positions `xy` (N, 2), each of a `section` (N,)."""
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for name in pd.unique(section):
        rows = np.flatnonzero(section == name)
        reach = TOUCHING * spacing(xy[rows])
        pairs.append(rows[cKDTree(xy[rows]).query_pairs(reach, output_type="ndarray")])
    i, j = np.concatenate(pairs).T
    half = sp.coo_matrix((np.ones(len(i)), (i, j)), (len(xy), len(xy)))
    return sp.csr_matrix(half + half.T)


def rows_to_one(weights: sp.csr_matrix) -> sp.csr_matrix:
    """Every row divided by its sum; rows without any stay empty."""
    total = np.asarray(weights.sum(axis=1)).ravel()
    return sp.csr_matrix(sp.diags(np.divide(1, total, out=np.zeros_like(total), where=total > 0)) @ weights)


def morans_i(values: np.ndarray, weights: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Moran's I of every gene, and how unlikely it is without spatial order.

    Parameters
    ----------
    values : (N, G)
    weights : (N, N)
        Of a spot's neighbours; the diagonal is 0.

    Returns
    -------
    I : (G,)
        n / W x sum_ij w_ij z_i z_j / sum_i z_i^2 (Moran 1950); NaN for genes that are constant or hold NaN.
    z : (G,)
        I less its mean -1 / (n - 1), by its standard deviation where values are drawn from one normal distribution
        (Cliff and Ord 1981).
    """
    values = np.asarray(values, dtype=np.float64)
    n, total = len(values), weights.sum()
    if n < 3 or total == 0:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    spread = np.ptp(values, axis=0)
    varies = spread > 1e-6 * np.abs(values).max(axis=0)  # NaN compares as False
    centred = values[:, varies] - values[:, varies].mean(axis=0)
    moran, z = np.full((2, values.shape[1]), np.nan)
    moran[varies] = n / total * (centred * (weights @ centred)).sum(axis=0) / (centred**2).sum(axis=0)
    both = weights + weights.T
    s1 = both.multiply(both).sum() / 2
    s2 = (np.asarray(both.sum(axis=1)) ** 2).sum()
    mean = -1 / (n - 1)
    variance = (n**2 * s1 - n * s2 + 3 * total**2) / (total**2 * (n**2 - 1)) - mean**2
    z[varies] = (moran[varies] - mean) / np.sqrt(variance)
    return moran, z


def variable_genes(adata: ad.AnnData) -> pd.DataFrame:
    """Moran's I of the prediction in each section, and of the truth where it is known.

    Returns
    -------
    DataFrame
        section, gene, ``predicted`` and ``predicted_q``, and with a truth ``observed`` and ``observed_q``: I over spots
        that touch, rows of weights summing to 1, and the false discovery rate among the section's genes; by falling
        ``predicted``.

    Notes
    -----
    Predictions are smoother than counts: their I is higher and nearly always significant. What ranks genes in truth
    too is seen by comparing both columns.
    """
    weights, section, tables = rows_to_one(adjacency(adata)), adata.obs["section"].to_numpy(str), []
    for name in pd.unique(section):
        rows = np.flatnonzero(section == name)
        table = pd.DataFrame({"section": name, "gene": adata.var_names.to_numpy(str)})
        for layer in ("predicted", "observed"):
            if layer in adata.layers:
                table[layer], z = morans_i(adata.layers[layer][rows], weights[rows][:, rows])
                table[f"{layer}_q"] = np.nan
                varies = np.flatnonzero(~np.isnan(z))
                if len(varies):
                    table.loc[varies, f"{layer}_q"] = false_discovery_control(norm.sf(z[varies]))
        tables.append(table.sort_values("predicted", ascending=False, kind="stable", na_position="last"))
    return pd.concat(tables, ignore_index=True)


def structure(observed: np.ndarray, predicted: np.ndarray, xy: np.ndarray) -> dict[str, float | None]:
    """How far a prediction has the spatial order of the truth in one section, so that blur does not pass for skill.

    Parameters
    ----------
    observed, predicted : (Q, G)
        NaN columns of `observed` are genes not measured.
    xy : (Q, 2)

    Returns
    -------
    dict
        ``moran_observed``, ``moran_predicted`` : Moran's I over spots that touch, median over the genes that vary in
        the truth. ``moran_concordance`` : Lin's concordance of predicted with observed I over genes: 1 where each gene
        is as ordered as in truth; a blurred prediction, whose I are all high, has nearly 0. A gene whose prediction
        is constant has no order: its I counts as 0. None where it cannot be computed.
    """
    weights = rows_to_one(touching(np.asarray(xy, dtype=np.float64), np.zeros(len(xy), dtype=int)))
    of_truth, of_prediction = morans_i(observed, weights)[0], morans_i(predicted, weights)[0]
    scored = ~np.isnan(of_truth)
    if not scored.any():
        return {"moran_observed": None, "moran_predicted": None, "moran_concordance": None}
    truth, prediction = of_truth[scored], np.nan_to_num(of_prediction[scored])
    covariance = np.mean((truth - truth.mean()) * (prediction - prediction.mean()))
    spread = truth.var() + prediction.var() + (truth.mean() - prediction.mean()) ** 2
    return {
        "moran_observed": float(np.median(truth)),
        "moran_predicted": float(np.median(prediction)),
        "moran_concordance": float(2 * covariance / spread) if spread > 0 and len(truth) > 1 else None,
    }


def structural_similarity(observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """SSIM of every gene over the spots of a section, (G,), of maps scaled by their maximum.

    One window, the whole section, with the constants 0.01 and 0.03, as Li et al. 2022 (Nature Methods 19, 662) score
    spatial gene patterns. It is of maps from 0 to 1: predictions below 0 count as 0, of which two negatives would else
    make a likeness where one map is the other upside down. NaN where the truth is constant, not measured, nowhere above
    0, or somewhere below it, as residuals are.
    """
    observed, predicted = np.asarray(observed, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    top = observed.max(axis=0)
    scored = (np.ptp(observed, axis=0) > 0) & (top > 0) & (observed.min(axis=0) >= 0)
    out = np.full(observed.shape[1], np.nan)
    truth, guess = observed[:, scored] / top[scored], predicted[:, scored].clip(min=0)
    height = guess.max(axis=0)
    guess = guess / np.where(height > 0, height, 1)
    a, b = truth.mean(axis=0), guess.mean(axis=0)
    covariance = ((truth - a) * (guess - b)).mean(axis=0)
    light = (2 * a * b + 0.01**2) / (a**2 + b**2 + 0.01**2)
    out[scored] = light * (2 * covariance + 0.03**2) / (truth.var(axis=0) + guess.var(axis=0) + 0.03**2)
    return out
