"""Spots that touch, and genes that vary in space."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import cKDTree
from scipy.stats import false_discovery_control, norm

from stexp.evaluation import predictions

TOUCHING = 1.3  # spacings: neighbours on a hexagonal or square grid, diagonals left out


def adjacency(adata: ad.AnnData) -> sp.csr_matrix:
    """Spots that touch: within 1.3 of the spacing in the same section; (N, N), 0 and 1, symmetric."""
    xy, section = np.asarray(adata.obsm["spatial"], dtype=np.float64), adata.obs["section"].to_numpy(str)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for name in pd.unique(section):
        rows = np.flatnonzero(section == name)
        reach = TOUCHING * predictions.spacing(xy[rows])
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
