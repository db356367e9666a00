"""What stexp-predict leaves of a slide, made up without a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from stexp.evaluation import predictions
from stexp.protocol import Protocol

UM, SIZE = 0.5, (2600, 2010)  # width, height


class FakeSlide:
    """A slide whose thumbnail has another colour at every place."""

    size = SIZE
    path = Path("slide.png")

    def thumbnail(self, max_px: int) -> tuple[np.ndarray, float]:
        width, height = (side // 10 for side in SIZE)
        y, x = np.mgrid[:height, :width]
        return np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8), 0.1


def predicted(kind: str = "hexagonal", n_genes: int = 8, name: str = "slide", seed: int = 0) -> ad.AnnData:
    """Expression that follows the place, on a grid of 100 um; the last spot lies outside what the model knows."""
    rng, step = np.random.default_rng(seed), 100 / UM
    row, column = (each.ravel() for each in np.mgrid[:9, :11])
    odd = row % 2 * (kind == "hexagonal")
    xy = 180 + step * np.column_stack([column + odd / 2, row * (np.sqrt(0.75) if kind == "hexagonal" else 1)])
    array = np.column_stack([2 * column + odd if kind == "hexagonal" else column, row])
    x, y = (xy / SIZE).T
    waves = np.stack([np.sin((2 + i) * x + i) + np.cos((1 + i % 3) * y) for i in range(n_genes)], axis=1)
    values = (2 + waves + rng.normal(0, 0.2, waves.shape)).astype(np.float32)
    names = pd.Index([f"G{i}" for i in range(n_genes)], name="gene")
    obs = pd.DataFrame(
        {
            "section": pd.Categorical([name] * len(xy)),
            "array_x": array[:, 0],
            "array_y": array[:, 1],
            "pixel_x": xy[:, 0],
            "pixel_y": xy[:, 1],
            "neighbour_distance": rng.random(len(xy)),
            "out_of_distribution": np.arange(len(xy)) == len(xy) - 1,
        },
        index=pd.Index([f"{i}x{j}" for i, j in array], name="spot"),
    )
    adata = ad.AnnData(values, obs=obs, var=pd.DataFrame({"expected_pearson": rng.random(n_genes)}, index=names))
    adata.layers["predicted"], adata.layers["uncertainty"] = values.copy(), 0.1 * values
    adata.layers["uncertainty"][0, 0] = np.nan
    adata.obsm["spatial"] = xy
    adata.obsm["image_embedding"] = rng.normal(size=(len(xy), 5)).astype(np.float32)
    adata.uns["spatial"] = {name: predictions.plotted_slide(FakeSlide(), xy, UM)}
    references = pd.DataFrame({"section": list("ABC"), "patient": list("ABC"), "spot": ["1x1", "2x1", "3x1"]})
    references.index = references["section"] + ":" + references["spot"]
    rows = np.argsort(rng.random((len(xy), 3)), axis=1)
    predictions.add_neighbours(adata, references, rows, np.tile([0.5, 0.3, 0.1], (len(xy), 1)))
    adata.uns["stexp"] = {
        "kind": "prediction",
        "protocol": json.dumps(asdict(Protocol("strict"))),
        "um_per_px": UM,
        "grid": kind,
        "model": "mclstexp",
        "qupath_origin_px": [0, 0],
    }
    return adata
