"""Predictions for QuPath: spots as detections with measurements."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from stexp.files import replacing
from stexp.reporting.places import Place

LAYERS = {"predicted": "", "uncertainty": " sd", "lower": " lower", "upper": " upper", "observed": " observed"}
"""What is exported of a gene, and what its measurements in QuPath are called after its name."""
POSITIONS = ("pixel_x", "pixel_y", "array_x", "array_y")
CORNERS = 24  # of the polygon that stands for a round spot
# Okabe and Ito's, told apart by colour-blind readers, then lighter ones
COLOURS = [
    *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (86, 180, 233), (240, 228, 66)),
    *((120, 120, 120), (136, 34, 85), (68, 170, 153), (153, 153, 51), (51, 34, 136)),
]


def write_geojson(adata: ad.AnnData, place: Place, genes: Sequence[str], path: Path) -> Path:
    """The spots of a section as detections that QuPath 0.4 and later imports, with their measurements.

    A square grid becomes squares that touch; other spots are round. Coordinates are level-0 pixels, counted from
    where QuPath does. What is NaN is left out, since JSON has no word for it.

    Notes
    -----
    Structure as QuPath's PathObjectTypeAdapters read it: a feature's id is a UUID, ``properties`` have objectType,
    name, classification (name and colour) and measurements (an object of numbers).
    """
    spots, about = adata[place.rows], adata.uns["stexp"]
    values = _measurements(spots, genes)
    names, table = list(values), np.column_stack(list(values.values()))
    classes, colours = _classes(spots.obs)
    if about.get("grid") == "square":
        outline = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * place.spacing / 2
    else:
        angle = 2 * np.pi * np.arange(CORNERS) / CORNERS
        outline = np.column_stack([np.cos(angle), np.sin(angle)]) * place.diameter / 2
    outline = np.concatenate([outline, outline[:1]])
    corner = np.asarray(about.get("qupath_origin_px", (0, 0)))
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for i, (spot, xy, row) in enumerate(zip(spots.obs_names, place.xy - corner, table, strict=True)):
            feature = {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{place.name}:{spot}")),
                "geometry": {"type": "Polygon", "coordinates": [np.round(xy + outline, 1).tolist()]},
                "properties": {
                    "objectType": "detection",
                    "name": str(spot),
                    "classification": {"name": classes[i], "color": colours[i]},
                    "measurements": {
                        key: float(f"{value:.6g}")
                        for key, value in zip(names, row, strict=True)
                        if math.isfinite(value)
                    },
                },
            }
            file.write((",\n" if i else "\n") + json.dumps(feature, allow_nan=False))
        file.write("\n]}\n")
    return path


def layers_of(adata: ad.AnnData) -> list[str]:
    """Names of `LAYERS` that hold any value."""
    return [key for key in LAYERS if key in adata.layers and np.isfinite(np.asarray(adata.layers[key])).any()]


def _measurements(adata: ad.AnnData, genes: Sequence[str]) -> dict[str, np.ndarray]:
    """Values of the spots by the name that QuPath shows: layers of the genes, and numbers of ``obs``."""
    columns = adata.var_names.get_indexer(genes)
    out: dict[str, np.ndarray] = {}
    layers = {key: np.asarray(adata.layers[key][:, columns]) for key in layers_of(adata)}
    for i, gene in enumerate(genes):
        out |= {f"{gene}{LAYERS[key]}": values[:, i] for key, values in layers.items()}
    for key, values in adata.obs.items():
        if key not in POSITIONS and pd.api.types.is_numeric_dtype(values):
            out[str(key).replace("_", " ")] = values.to_numpy(np.float64)
    return out


def _classes(obs: pd.DataFrame) -> tuple[list[str], list[list[int]]]:
    """A spot's class and its colour: the domain where there are any, else whether it is like the training tiles."""
    if "domain" in obs:
        names = obs["domain"].astype(str)
        order = {name: i for i, name in enumerate(sorted(set(names), key=lambda name: (len(name), name)))}
        return [f"Domain {name}" for name in names], [list(COLOURS[order[name] % len(COLOURS)]) for name in names]
    strange = obs["out_of_distribution"].to_numpy(bool) if "out_of_distribution" in obs else np.zeros(len(obs), bool)
    kinds = [
        ("Out of distribution", list(COLOURS[4])) if is_strange else ("Spot", list(COLOURS[0]))
        for is_strange in strange
    ]
    return [name for name, _ in kinds], [colour for _, colour in kinds]
