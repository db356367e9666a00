"""Differences of two predictions of the same spots, gene by gene and on maps."""

from __future__ import annotations

import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.evaluation.metrics import pearson_per_gene
from stexp.reporting.places import places, spot_ids

log = logging.getLogger(__name__)

NEAR_PX = 1.0  # spots of one name are the same spot where they are no further apart
DRAWN = 4  # genes


def compare(first: ad.AnnData, second: ad.AnnData) -> tuple[pd.DataFrame, ad.AnnData]:
    """Compare what two models, or two settings, predict for the spots and genes that both have.

    Parameters
    ----------
    first, second
        Predictions on one scale. Spots are matched by section and id, and by id alone where each has one section.

    Returns
    -------
    table : DataFrame
        Per section and gene, by falling ``rmsd``: ``mean`` and ``other_mean``, ``difference`` of these (first less
        second), root mean squared difference over spots, ``pearson`` of one with the other; and with a truth
        ``pearson_observed`` and ``other_pearson_observed``.
    AnnData
        ``X``: first less second; layers ``predicted`` and ``other``; positions and images as scanpy plots them.

    Raises
    ------
    InputError
        No spot or gene in common, spots of one name at different places, or different scales.
    """
    scales = [predictions.protocol_of(adata).scale for adata in (first, second)]
    if scales[0] != scales[1]:
        raise InputError("downstream.against: the two are on different scales (protocols normalise differently)")
    keys = [_keys(adata, first, second) for adata in (first, second)]
    rows = pd.Index(keys[1]).get_indexer(keys[0])
    genes = [gene for gene in first.var_names if gene in second.var_names]
    shared, of_second = np.flatnonzero(rows >= 0), rows[rows >= 0]
    if not len(shared) or not genes:
        raise InputError(
            f"downstream.against: {len(shared)} spots and {len(genes)} genes in common of {first.shape} and "
            f"{second.shape}; predict the same slide with the same grid or coordinates"
        )
    apart = np.abs(np.asarray(first.obsm["spatial"])[shared] - np.asarray(second.obsm["spatial"])[of_second]).max()
    if apart > NEAR_PX:
        raise InputError(f"downstream.against: spots of one name are up to {apart:.0f} px apart: not the same slide?")
    log.info("%d of %d spots and %d of %d genes are in both", len(shared), first.n_obs, len(genes), first.n_vars)
    first, second = first[shared, genes].copy(), second[of_second, genes]
    maps = ad.AnnData(obs=first.obs, var=pd.DataFrame(index=first.var_names))
    maps.layers["predicted"], maps.layers["other"] = (
        np.asarray(adata.layers["predicted"], dtype=np.float32) for adata in (first, second)
    )
    maps.X = maps.layers["predicted"] - maps.layers["other"]
    maps.obsm["spatial"], maps.uns["spatial"] = first.obsm["spatial"], first.uns.get("spatial", {})
    maps.uns["stexp"] = {"first": _model(first), "second": _model(second), "protocol": first.uns["stexp"]["protocol"]}
    observed = np.asarray(first.layers["observed"]) if "observed" in first.layers else None
    return _table(maps, observed), maps


def _table(maps: ad.AnnData, observed: np.ndarray | None) -> pd.DataFrame:
    """The table of :func:`compare`, of two predictions of the same spots and genes."""
    section, tables = maps.obs["section"].to_numpy(str), []
    for name in pd.unique(section):
        rows = section == name
        a, b = (maps.layers[key][rows].astype(np.float64) for key in ("predicted", "other"))
        table = pd.DataFrame({"section": name, "gene": maps.var_names.to_numpy(str)})
        table["mean"], table["other_mean"] = a.mean(axis=0), b.mean(axis=0)
        table["difference"] = (a - b).mean(axis=0)
        table["rmsd"] = np.sqrt(np.square(a - b).mean(axis=0))
        table["pearson"] = pearson_per_gene(b, a)
        if observed is not None:
            table["pearson_observed"] = pearson_per_gene(observed[rows], a)
            table["other_pearson_observed"] = pearson_per_gene(observed[rows], b)
        tables.append(table.sort_values("rmsd", ascending=False, kind="stable"))
    return pd.concat(tables, ignore_index=True)


def draw(table: pd.DataFrame, maps: ad.AnnData, path: Path) -> Path:
    """Maps of the genes that differ most in the first section: both predictions on one scale, and their difference."""
    # matplotlib takes a second, and only these maps need it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from stexp.reporting.overlay import save

    place = places(maps)[0]
    genes = list(table.loc[table["section"] == place.name, "gene"].iloc[:DRAWN])
    low, high = place.xy.min(axis=0) - place.spacing, place.xy.max(axis=0) + place.spacing
    tall = 3.2 * (high - low)[1] / (high - low)[0]
    figure = Figure(figsize=(11, len(genes) * (tall + 0.4)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(genes), 3, squeeze=False)
    size = (0.9 * place.spacing / (high - low)[0] * 3.2 * 72) ** 2  # points^2
    for row, gene in zip(axes, genes, strict=True):
        a, b, difference = (
            np.asarray(values[place.rows][:, maps.var_names.get_loc(gene)], dtype=np.float64)
            for values in (maps.layers["predicted"], maps.layers["other"], maps.X)
        )
        shared = {"vmin": min(a.min(), b.min()), "vmax": max(a.max(), b.max()), "cmap": "viridis"}
        largest = max(np.abs(difference).max(), 1e-9)
        panels = (("this", a, shared), ("other", b, shared), ("this - other", difference, _around_zero(largest)))
        for ax, (title, values, colours) in zip(row, panels, strict=True):
            dots = ax.scatter(*place.xy.T, c=values, s=size, linewidths=0, **colours)
            ax.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", xticks=[], yticks=[])
            ax.set_title(f"{gene}: {title}", fontsize=10)
            figure.colorbar(dots, ax=ax, shrink=0.8)
    save(figure, path)
    return path


def _around_zero(largest: float) -> dict:
    return {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}


def _keys(adata: ad.AnnData, *both: ad.AnnData) -> list[str]:
    """Names of spots, with their section where one of both predictions has several."""
    several = any(each.obs["section"].nunique() > 1 for each in both)
    section = adata.obs["section"].to_numpy(str) if several else [""] * adata.n_obs
    return [f"{name}:{spot}" for name, spot in zip(section, spot_ids(adata), strict=True)]


def _model(adata: ad.AnnData) -> str:
    """Method, data, fold and digest of the model, as far as the predictions name them."""
    about = adata.uns["stexp"]
    return " ".join(str(about[key]) for key in ("model", "data", "fold", "model_digest") if key in about)
