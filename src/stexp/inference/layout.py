"""Predictions of a slide as AnnData, before anything is said of their worth."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.slides.formats import slide_name
from stexp.evaluation import predictions
from stexp.inference.places import Places


def as_anndata(places: Places, arrays: dict[str, Any], genes: pd.DataFrame) -> ad.AnnData:
    """Spots, genes, layers and image as :meth:`stexp.inference.predictor.Model.predict` returns them."""
    name, grid = slide_name(places.slide.path), places.grid
    spots = grid.names
    if spots is None:
        spots = [f"{x}x{y}" for x, y in grid.array_xy]
        if len(set(spots)) < len(spots):  # given coordinates may share a place on the array
            spots = [str(i) for i in range(len(spots))]
    obs = pd.DataFrame(
        {
            "section": pd.Categorical([name] * len(spots)),
            "array_x": grid.array_xy[:, 0],
            "array_y": grid.array_xy[:, 1],
            "pixel_x": grid.xy_px[:, 0],
            "pixel_y": grid.xy_px[:, 1],
        },
        index=pd.Index(spots, name="spot"),
    )
    if "obs" in arrays:
        obs = pd.concat([obs, arrays["obs"].set_index(obs.index)], axis=1)
    predicted = arrays["predicted"]
    adata = ad.AnnData(predicted, obs=obs, var=genes.copy())
    adata.layers["predicted"] = predicted.copy()  # X is what people transform
    spread = arrays.get("uncertainty")
    adata.layers["uncertainty"] = np.full(predicted.shape, np.nan, np.float32) if spread is None else spread
    adata.obsm["spatial"] = np.asarray(grid.xy_px, dtype=np.float64)
    if "image_embedding" in arrays:
        adata.obsm["image_embedding"] = arrays["image_embedding"]
    plotted = predictions.plotted_slide(places.slide, adata.obsm["spatial"], places.um_per_px)
    adata.uns["spatial"] = {name: plotted}
    return adata
