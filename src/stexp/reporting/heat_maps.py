"""Predictions as images for viewers of slides: a channel a gene."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import tifffile
from scipy.spatial import cKDTree

from stexp.files import replacing
from stexp.reporting.places import Place

REACH = 0.75  # of the spacing: no place between neighbours of a hexagonal or square grid is further from a spot
MOST_PX = 4096  # longest side of a heat map
TILE_PX = 256


def write_ome_tiff(adata: ad.AnnData, place: Place, genes: Sequence[str], path: Path) -> Path:
    """Heat maps, a channel a gene, as a pyramidal OME-TIFF of float32 that covers the whole slide.

    A pixel is a quarter of the spacing wide (more where the longer side would pass `MOST_PX`), a whole number of
    level-0 pixels, and has the prediction of the nearest spot; it is NaN further from all spots than `REACH`
    spacings. Viewers that place images by their physical size lay it over the slide. One plane is held at a time.
    """
    factor = max(1, round(place.spacing / 4), math.ceil(max(place.size) / MOST_PX))
    nearest = _nearest(place, factor)
    n_levels = max(1, math.ceil(math.log2(max(1, max(nearest.shape) / TILE_PX))) + 1)
    values = np.asarray(adata.layers["predicted"][place.rows][:, adata.var_names.get_indexer(genes)], dtype=np.float32)

    def planes(level: int) -> Iterator[np.ndarray]:
        for gene in range(len(genes)):
            plane = np.where(nearest < 0, np.float32(np.nan), values[nearest, gene])
            for _ in range(level):
                plane = _halve(plane)
            height, width = plane.shape
            plane = np.pad(plane, ((0, -height % TILE_PX), (0, -width % TILE_PX)), constant_values=np.nan)
            for y in range(0, height, TILE_PX):
                for x in range(0, width, TILE_PX):
                    yield plane[y : y + TILE_PX, x : x + TILE_PX]

    about: dict[str, Any] = {"axes": "CYX", "Name": place.name, "Channel": {"Name": list(genes)}}
    um = None if place.um_per_px is None else place.um_per_px * factor
    if um is not None:
        about |= {"PhysicalSizeX": um, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": um, "PhysicalSizeYUnit": "µm"}
    with (
        replacing(path, suffix=".part.ome.tiff") as part,  # tifffile writes OME to files of this name only
        tifffile.TiffWriter(part, bigtiff=True, ome=True) as file,
    ):
        height, width = nearest.shape
        for level in range(n_levels):
            scale: dict[str, Any] = (
                {} if um is None else {"resolution": [1e4 / (um * 2**level)] * 2, "resolutionunit": "CENTIMETER"}
            )
            file.write(
                planes(level),
                shape=(len(genes), -(-height // 2**level), -(-width // 2**level)),
                dtype=np.float32,
                tile=(TILE_PX, TILE_PX),
                photometric="minisblack",
                compression="zlib",
                predictor=True,
                subifds=n_levels - 1 if level == 0 else None,
                subfiletype=0 if level == 0 else 1,
                metadata=about if level == 0 else None,
                **scale,
            )
    return path


def _nearest(place: Place, factor: int) -> np.ndarray:
    """The nearest spot of every pixel, (h, w) int32; -1 where none is near."""
    width, height = (-(-side // factor) for side in place.size)
    tree, out = cKDTree(place.xy), np.empty((height, width), dtype=np.int32)
    x = (np.arange(width) + 0.5) * factor
    for start in range(0, height, 64):
        y = (np.arange(start, min(start + 64, height)) + 0.5) * factor
        points = np.stack(np.broadcast_arrays(x[None], y[:, None]), axis=-1)
        _, spot = tree.query(points, distance_upper_bound=REACH * place.spacing)
        out[start : start + 64] = np.where(spot == len(place.xy), -1, spot)
    return out


def _halve(plane: np.ndarray) -> np.ndarray:
    """Mean of every 2 x 2 pixels that are not NaN."""
    height, width = plane.shape
    blocks = np.pad(plane, ((0, height % 2), (0, width % 2)), constant_values=np.nan)
    blocks = blocks.reshape(-(-height // 2), 2, -(-width // 2), 2)
    measured = np.isfinite(blocks)
    count = measured.sum(axis=(1, 3), dtype=np.float32)
    total = np.where(measured, blocks, 0).sum(axis=(1, 3))
    return np.divide(total, count, out=np.full(count.shape, np.nan, np.float32), where=count > 0)
