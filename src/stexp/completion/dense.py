"""Maps between the spots: the shown spots kriged to a fine grid over the section."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from stexp.completion.problem import Problem
from stexp.completion.spots import fit_kriging
from stexp.completion.tasks import SpotTask
from stexp.data.slides.spacing import spacing

REACH = 0.75
"""Of the map beyond the spots, in pitches."""
MOST = 20_000
"""Places of a map; of a large section they lie less densely."""


def dense_places(xy: np.ndarray, per_pitch: int) -> np.ndarray:
    """Places of a square grid around spots (N, 2), in pitches, (D, 2)."""
    while True:
        low, high = xy.min(axis=0) - REACH, xy.max(axis=0) + REACH
        axes = [np.arange(start, end + 1e-9, 1 / per_pitch) for start, end in zip(low, high, strict=True)]
        grid = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
        places = grid[cKDTree(xy).query(grid)[0] <= REACH]
        if len(places) <= MOST or per_pitch == 1:
            return places
        per_pitch -= 1


def dense_map(problem: Problem, per_pitch: int) -> ad.AnnData:
    """Expression between the spots of a section some of whose spots are shown, with its uncertainty.

    Returns
    -------
    AnnData, places x genes
        ``layers``: ``predicted`` and ``uncertainty``, kriging's estimate and its standard deviation; ``observed``, the
        shown spot whose half pitch holds the place, NaN elsewhere. ``obsm["spatial"]`` in level-0 pixels.
    """
    task = problem.task
    assert isinstance(task, SpotTask)
    xy = task.xy[task.shown]
    places = dense_places(task.xy, per_pitch)
    mean, sd = fit_kriging(task).predict(xy, task.expression, places)
    distance, nearest = cKDTree(xy).query(places)
    observed = np.where((distance <= 0.5)[:, None], task.expression[nearest], np.nan)
    obs = pd.DataFrame({"section": problem.section.name}, index=[f"place{i}" for i in range(len(places))])
    adata = ad.AnnData(mean.astype(np.float32), obs=obs, var=pd.DataFrame(index=problem.truth.genes))
    adata.layers["predicted"], adata.layers["uncertainty"] = mean.astype(np.float32), sd.astype(np.float32)
    adata.layers["observed"] = observed.astype(np.float32)
    adata.obsm["spatial"] = places * spacing(problem.section.xy_px)
    return adata
